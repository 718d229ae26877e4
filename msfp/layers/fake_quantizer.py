"""The format, scale and zero point of a tensor as a module."""

from __future__ import annotations

import torch
from torch import nn

from fpformats import FloatFormat, quantize_scaled
from msfp.layers.execution.grids import to_whole, token_sizes, whole_steps
from msfp.layers.float32 import Float32Module


class Quantizer(Float32Module):
    """Rounds a tensor to `scale * v + zero_point`, where v is a value of the format.

    Gradients are straight-through inside the range and zero outside it. If scale and zero point
    require gradients, these are the gradients of LSQ (Esser et al., ICLR 2020).

    Args:
        fmt: The format of the codes.
        scale: Float32, any shape that broadcasts with the input.
        zero_point: Float32, any shape that broadcasts with the input, or None for no zero point.

        by_token: Whether scale and zero point, one number each, are in units of the largest
            magnitude of each token. Features are then on the last axis of the input.

    Attributes:
        whole: Whether the zero point is a whole number of steps, which it then stays in training.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def __init__(
        self,
        fmt: FloatFormat,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None = None,
        *,
        by_token: bool = False,
    ) -> None:
        super().__init__()
        self.format, self.by_token = fmt, by_token
        self.scale = nn.Parameter(scale.float(), requires_grad=False)
        self.zero_point = (
            None if zero_point is None else nn.Parameter(zero_point.float(), requires_grad=False)
        )
        self.whole = zero_point is None or (
            zero_point.numel() == 1
            and not zero_point.is_meta
            and whole_steps(fmt, self.scale, zero_point.float()) is not None
        )

    @property
    def step(self) -> torch.Tensor:
        """The scale times the format's step, without a gradient, shape of the scale."""
        return self.scale.detach() * self.format.step

    def scales_of(self, shape: torch.Size) -> torch.Tensor:  # noqa: ARG002
        """Return the scales of a weight of a shape, in a shape that broadcasts to it."""
        return self.scale

    def chosen_of(self, shape: torch.Size) -> torch.Tensor | None:  # noqa: ARG002
        """Return which weights of a shape have the alternative format; None if there is none."""
        return None

    @property
    def alternative(self) -> FloatFormat | None:
        """A second format, of the weights for which `chosen_of` is true."""
        return None

    @property
    def shift(self) -> torch.Tensor | None:
        """The zero point; if it is whole, rounded to a whole number of steps."""
        trained = self.scale.requires_grad or (
            self.zero_point is not None and self.zero_point.requires_grad
        )
        if self.zero_point is None or not self.whole or not trained:
            return self.zero_point
        step = self.scale * self.format.step
        steps = (-self.zero_point / step).clamp(0, self.format.max_steps)
        return -to_whole(steps) * step

    def grid(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scale and the zero point of each token of an input, or of all."""
        if not self.by_token:
            return self.scale, self.shift
        sizes, shift = token_sizes(x), self.shift
        return self.scale * sizes, None if shift is None else shift * sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x rounded, same shape and dtype."""
        scale, shift = self.grid(x)
        rounded: torch.Tensor = quantize_scaled(x, self.format, scale, shift, clip_gradient=True)
        return rounded

    def steps(self, x: torch.Tensor) -> torch.Tensor:
        """Return x in whole numbers of steps, in float32; the zero point must be whole.

        The gradient is that of rounding, divided by the step.
        """
        step = self.step * token_sizes(x) if self.by_token else self.step
        return to_whole(self(x.float()) / step)

    def extra_repr(self) -> str:
        """Return the description in `repr`."""
        zero = "" if self.zero_point is None else ", zero_point"
        tokens = ", by token" if self.by_token else ""
        return f"{self.format}, scale {tuple(self.scale.shape)}{zero}{tokens}"
