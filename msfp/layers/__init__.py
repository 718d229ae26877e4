"""Quantized layers, and how their products are computed."""
