"""Post-training quantization: quantize a whole denoiser, and refine it without training."""
