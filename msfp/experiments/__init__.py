"""The models that ship, the demo and the study."""
