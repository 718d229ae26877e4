"""Floating-point products of dequantized operands: the portable, bit-exact reference."""

from __future__ import annotations

import torch

from msfp.layers.execution.protocol import ProductLayer


class FloatPath:
    """Rounds the input, dequantizes the weight, and applies the plain layer."""

    def takes(self, layer: ProductLayer, x: torch.Tensor) -> bool:
        """Return True, because it supports all layers and inputs."""
        del layer, x
        return True

    def product(self, layer: ProductLayer, x: torch.Tensor, adapter: int) -> torch.Tensor:
        """Return the layer's output, in the dtype of the input."""
        rounded = layer.quantize_input(x)
        return layer.compute(rounded, layer.quantized_weight(adapter, x.dtype), layer.bias)
