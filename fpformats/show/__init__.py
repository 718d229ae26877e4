"""Formats as text, CSV, HTML and pictures."""
