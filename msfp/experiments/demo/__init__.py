"""The demo: quantize the reference model to 4 bits, and restore its image quality."""
