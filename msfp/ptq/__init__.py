"""Post-training quantization of a whole denoiser, and refinement without training."""
