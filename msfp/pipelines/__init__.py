"""The user's pipeline: its denoiser, its calls, and recordings of these."""
