"""Quantized denoisers as files, written and read by diffusers or without it."""
