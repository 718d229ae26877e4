"""The search of a format, scale and zero point for data, by the squared error."""
