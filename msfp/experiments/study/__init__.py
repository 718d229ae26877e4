"""A reproducible study of quantization recipes on the reference models."""
