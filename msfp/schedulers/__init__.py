"""All that is known of diffusers' schedulers: samplers, denoising factors."""
