"""What an execution back end is, and what it may know of a layer."""

from __future__ import annotations

from typing import Protocol

import torch


class Product(Protocol):
    """A quantized layer as back ends see it: rounded operands, and the plain operation on them."""

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
    """One way to compute a product; all give the same bits.

    Attributes:
        name: What `msfp inspect` calls it.
    """

    name: str

    def takes(self, layer: Product, x: torch.Tensor) -> bool:
        """Return whether it computes the product of a layer and such an input."""

    def product(self, layer: Product, x: torch.Tensor, adapter: int) -> torch.Tensor:
        """Return the layer's output, bias included, without what stands beside the weight.

        Args:
            layer: That it takes.
            x: The input, not rounded yet.
            adapter: Of the hub, 0 where there is one.
        """
