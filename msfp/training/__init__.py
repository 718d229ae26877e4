"""Fine-tuning: the quantized denoiser learns from the full-precision one."""
