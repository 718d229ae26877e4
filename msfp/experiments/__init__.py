"""Reference models, the demo and the study."""
