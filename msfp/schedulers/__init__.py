"""All that is known of diffusers' schedulers: samplers by name, denoising factors."""
