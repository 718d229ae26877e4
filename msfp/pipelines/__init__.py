"""The user's pipeline: its denoiser, how it is called, and recordings of those calls."""
