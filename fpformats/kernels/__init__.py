"""The rounding itself, in C++, Triton and whole arrays."""
