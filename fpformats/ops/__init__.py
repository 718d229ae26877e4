"""The operations that users call: rounding, codes, scales, blocks, gradients."""
