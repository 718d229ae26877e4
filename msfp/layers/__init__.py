"""Quantized layers, their LoRAs, and what computes their products."""
