"""Formats as text, CSV and pictures."""
