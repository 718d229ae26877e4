"""What all rooms share, without models: checks, files, progress, hooks."""
