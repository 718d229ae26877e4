"""Quantized denoisers as files, through diffusers or without it."""
