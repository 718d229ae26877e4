"""Distilling the full-precision denoiser into the quantized one along the sampler's trajectory."""
