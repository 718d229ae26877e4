"""What users call: rounding, codes, scales, blocks, gradients."""
