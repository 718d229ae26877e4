"""Numbers about predictions and images."""
