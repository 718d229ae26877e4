"""What every room may use, with no models in it: checks, files, progress, hooks."""
