"""What computes the product of a quantized layer."""
