"""What computes the product of a packed layer."""
