"""Protocols of an execution back end, and of the layers that it computes."""

from __future__ import annotations

from typing import Protocol

import torch


class ProductLayer(Protocol):
    """A quantized layer, as back ends use it: rounded operands and the plain operation."""

    bias: torch.Tensor | None

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded, same shape and dtype."""

    def quantized_weight(self, adapter: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantized weight for an adapter of the hub."""

    def compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply the plain layer with other parameters."""


class Backend(Protocol):
    """One way to compute a product; all back ends return the same bits."""

    def takes(self, layer: ProductLayer, x: torch.Tensor) -> bool:
        """Return whether the back end supports a layer with this input."""

    def product(self, layer: ProductLayer, x: torch.Tensor, adapter: int) -> torch.Tensor:
        """Return the layer's output with the bias, but without low-rank branches.

        Args:
            layer: A layer that the back end supports.
            x: The input before rounding.
            adapter: Number of the adapter in the hub, 0 if there is only one.
        """
