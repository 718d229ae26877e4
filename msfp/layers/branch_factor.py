"""The first factor of a low-rank branch in 8 bits, as the back ends see a layer.

A branch computes `up @ (down @ x)`. In 8 bits, x is rounded to `E0M8U`, and each row of `down` to
`E0M7`, with the largest magnitude of the row as the largest value. Both are whole numbers times a
step, so that the product `down @ x` is the defined one. The product with `up` is in floating point.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fpformats import FloatFormat, parse
from msfp.layers.execution.grids import IntegerGrids, integer_grids, to_whole
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.kinds import LayerKind, kernel_shape

FACTOR_FORMAT: FloatFormat = parse("E0M7")
"""Format of the rows of the first factor, from -127 to 127 steps."""
INPUT_FORMAT: FloatFormat = parse("E0M8U")
"""Format of the input of a branch, from 0 to 255 steps."""


class BranchFactor(nn.Module):
    """A layer with the first factor of a low-rank branch as its weight, without bias.

    It is no submodule of the layer, and has no parameters of its own.

    Args:
        layer: The layer beside which the branch is.
        kind: The computation of the layer.
        factor: The first factor, shape (rank, columns).
        inputs: Quantizer of the input, with a whole zero point.
        keeps: Whether back ends may keep what they make of the factor.

    Attributes:
        integer_grids: The operands as whole numbers times steps, or the reason why they are not.
        weight_step: The steps of the rows, float32, shape (rank,).
    """

    bias: torch.Tensor | None = None
    plain: nn.Module
    factor: torch.Tensor
    inputs: Quantizer

    def __init__(
        self,
        layer: nn.Module,
        kind: LayerKind,
        factor: torch.Tensor,
        inputs: Quantizer,
        *,
        keeps: bool,
    ) -> None:
        super().__init__()
        self.__dict__ |= {"plain": layer, "factor": factor, "inputs": inputs}
        self.kind, self.keeps = kind, keeps
        self.shape = (len(factor), *kernel_shape(layer, factor))
        self.integer_grids: IntegerGrids | str = integer_grids(
            FACTOR_FORMAT,
            INPUT_FORMAT,
            inputs.scale.detach(),
            whole=inputs.whole,
            terms=math.prod(self.shape[1:]),
            channels=self.shape[1],
        )
        step = factor.detach().float().abs().amax(1) / FACTOR_FORMAT.max_steps
        self.weight_step = torch.where(step > 0, step, 1)
        self._kept: dict[Any, Any] = {}

    @property
    def needs_gradient(self) -> bool:
        """Whether the factor needs a gradient."""
        return bool(self.factor.requires_grad)

    def kept(self) -> dict[Any, Any]:
        """Return what has been made of the factor, if `keeps`."""
        return self._kept if self.keeps else {}

    @property
    def input_shift(self) -> torch.Tensor | None:
        """The zero point of the input, float32, shape ()."""
        return None if self.inputs.shift is None else self.inputs.shift.detach()

    def input_step(self, part: int) -> torch.Tensor:
        """Return the input scale times the step of its format, float32, shape ()."""
        del part
        return self.inputs.step

    def input_steps(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded to whole numbers of steps, float32, zero being 0."""
        return self.inputs.steps(x)

    def weight_steps(self, adapter: int) -> torch.Tensor:
        """Return the factor as whole numbers of steps, float32, in the shape of a weight."""
        del adapter
        most = FACTOR_FORMAT.max_steps
        steps = to_whole(self.factor.float() / self.weight_step[:, None])
        return steps.clamp(-most, most).view(self.shape)  # a subnormal step is inaccurate

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded, same shape and dtype."""
        rounded: torch.Tensor = self.inputs(x)
        return rounded

    def quantized_weight(self, adapter: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the rounded factor in the shape of a weight."""
        step = self.weight_step.view(-1, *(1,) * (len(self.shape) - 1))
        return (self.weight_steps(adapter) * step).to(dtype)

    def compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply the layer with other parameters."""
        return self.kind.compute(self.plain, x, weight, bias)
