"""The format, scale and zero point of a tensor as a module."""

from __future__ import annotations

import torch
from torch import nn

from fpformats import FloatFormat, quantize_scaled
from msfp.layers.float32 import Float32Module


class Quantizer(Float32Module):
    """Rounds a tensor to `scale * v + zero_point`, where v is a value of the format.

    Gradients are straight-through inside the range and zero outside it. If scale and zero point
    require gradients, these are the gradients of LSQ (Esser et al., ICLR 2020).

    Args:
        fmt: The format of the codes.
        scale: Float32, any shape that broadcasts with the input.
        zero_point: Float32, any shape that broadcasts with the input, or None for no zero point.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def __init__(
        self, fmt: FloatFormat, scale: torch.Tensor, zero_point: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.format = fmt
        self.scale = nn.Parameter(scale.float(), requires_grad=False)
        self.zero_point = (
            None if zero_point is None else nn.Parameter(zero_point.float(), requires_grad=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x rounded, same shape and dtype."""
        rounded: torch.Tensor = quantize_scaled(
            x, self.format, self.scale, self.zero_point, clip_gradient=True
        )
        return rounded

    def extra_repr(self) -> str:
        """Return the description in `repr`."""
        zero = "" if self.zero_point is None else ", zero_point"
        return f"{self.format}, scale {tuple(self.scale.shape)}{zero}"
