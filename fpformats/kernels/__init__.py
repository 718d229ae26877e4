"""Kernels: the rounding itself, on arrays and a flat parameter struct."""
