"""Products in floating point, on every device and with gradients."""

from __future__ import annotations

import torch

from msfp.layers.execution.definition import float_product, is_defined
from msfp.layers.execution.grids import IntegerGrids
from msfp.layers.execution.protocol import ProductLayer


class FloatPath:
    """Computes the defined product, where there is one.

    Otherwise it rounds the input, dequantizes the weight, and applies the plain layer.
    """

    def takes(self, layer: ProductLayer, x: torch.Tensor) -> bool:
        """Return True, because it supports all layers and inputs."""
        del layer, x
        return True

    def runs(self, grids: IntegerGrids, device: torch.device) -> bool:
        """Return True."""
        del grids, device
        return True

    def product(self, layer: ProductLayer, x: torch.Tensor, adapter: int) -> torch.Tensor:
        """Return the layer's output, in the dtype of the input."""
        if is_defined(layer, x):
            return float_product(layer, x, adapter)
        rounded = layer.quantize_input(x)
        return layer.compute(rounded, layer.quantized_weight(adapter, x.dtype), layer.bias)
