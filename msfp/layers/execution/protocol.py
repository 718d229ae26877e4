"""Protocols of an execution back end, and of the layers that it computes."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from msfp.layers.execution.grids import IntegerGrids
from msfp.layers.kinds import LayerKind


class ProductLayer(Protocol):
    """A quantized layer, as back ends use it: rounded operands and the plain operation."""

    bias: torch.Tensor | None

    @property
    def plain(self) -> Any:
        """The module with the attributes of the plain layer, such as its stride."""

    @property
    def kind(self) -> LayerKind:
        """The computation of the plain layer."""

    @property
    def keeps(self) -> bool:
        """Whether back ends may keep what they make of the weights."""

    @property
    def needs_gradient(self) -> bool:
        """Whether a parameter of the product needs a gradient."""

    @property
    def input_shift(self) -> torch.Tensor | None:
        """The zero point of the inputs, float32, shape (), or None."""

    def kept(self) -> dict[Any, Any]:
        """Return what has been made of the weights, if `keeps`; empty if they have changed."""

    @property
    def integer_grids(self) -> IntegerGrids | str:
        """The operands as whole numbers times steps, or the reason why they are not."""

    @property
    def weight_step(self) -> torch.Tensor:
        """Weight scales times the step of their format, float32, shape (rows,)."""

    def input_step(self, part: int) -> torch.Tensor:
        """Return an input scale times the step of its format, float32, shape ()."""

    def input_steps(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded to whole numbers of steps, float32, zero being 0."""

    def weight_steps(self, adapter: int) -> torch.Tensor:
        """Return the weight for an adapter as whole numbers of steps, float32."""

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

    def runs(self, grids: IntegerGrids, device: torch.device) -> bool:
        """Return whether the back end supports a layer with such grids on a device."""

    def product(self, layer: ProductLayer, x: torch.Tensor, adapter: int) -> torch.Tensor | None:
        """Return the layer's output with the bias, but without low-rank branches.

        It is None if the input has numbers that the back end does not support.

        Args:
            layer: A layer that the back end supports.
            x: The input before rounding.
            adapter: Number of the adapter in the hub, 0 if there is only one.
        """
