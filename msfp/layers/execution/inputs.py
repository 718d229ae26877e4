"""What integer back ends ask of inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import _C, nn

from msfp.layers.execution.grids import IntegerGrids, whole_steps
from msfp.layers.execution.protocol import ProductLayer

TYPES = (torch.Tensor, nn.Parameter)


def is_unwatched(x: torch.Tensor) -> bool:
    """Return whether a tensor is plain, and nothing intercepts operations on it."""
    return (
        type(x) in TYPES
        and not _C._len_torch_dispatch_stack()
        and not _C._len_torch_function_stack()
        and not torch.compiler.is_compiling()
        and x.layout is torch.strided
        and _C._get_tracing_state() is None
        and not _C._functorch.is_functorch_wrapped_tensor(x)
    )


def padded(layer: ProductLayer, x: torch.Tensor) -> torch.Tensor:
    """Return an input with the padding of a convolution that does not pad with zeros."""
    plain = layer.plain
    if plain.padding_mode == "zeros":
        return x
    return F.pad(x, plain._reversed_padding_repeated_twice, mode=plain.padding_mode)


class InputGrid(NamedTuple):
    """The grid of some channels of an input.

    Attributes:
        step: What a whole number counts, float32, shape ().
        scale: Scale of the format.
        shift: Zero point, or None.
        zero: The whole number that stands for zero.
    """

    step: torch.Tensor
    scale: float
    shift: float | None
    zero: int


def input_grid(layer: ProductLayer, grids: IntegerGrids, part: int) -> InputGrid:
    """Return the grid of the channels of a part."""
    step, shift = layer.input_step(part).detach(), layer.input_shift
    scale = step / grids.input.step  # exact: the format's step is a power of two
    if shift is None:
        return InputGrid(step, scale.item(), None, 0)
    zero = whole_steps(grids.input, scale, shift)
    return InputGrid(step, scale.item(), shift.item(), 0 if zero is None else int(zero))
