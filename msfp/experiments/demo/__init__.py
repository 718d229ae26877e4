"""The whole path on the reference model: lose its pictures at 4 bits, and get them back."""
