"""Rounding to a format given as a tensor: one compiled graph for all formats.

torch.compile treats a `FloatFormat` as a constant of the graph. A function called with many
formats is therefore compiled for each of them, and after a few not compiled at all. Here the
format is a small tensor, like the scale. A module may keep it as a buffer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpformats.engine.arrays import float_dtype_of, grid_of, is_tensor, needs_gradient
from fpformats.kernels.grid import FLOAT_DTYPES
from fpformats.kernels.plan import make_plan
from fpformats.parsing import as_format
from fpformats.rounding import FINITE, NEAREST

if TYPE_CHECKING:
    from fpformats.parsing import FormatLike

COUNT = 8


def format_parameters(fmt: FormatLike, *, device: Any = None) -> Tensor:
    """Write a format as a tensor.

    Args:
        fmt: A format with subnormal numbers and at most about 7 exponent and 21 mantissa bits,
            so that float32 has room for intermediate values.
        device: Device of the tensor.

    Returns:
        Float32 tensor of shape (8,), for `quantize_parametric`.

    Raises:
        ValueError: If the format is not of this kind.

    Example:
        >>> from fpformats import E2M1
        >>> x = torch.tensor([0.3, 1.25, -2.6])
        >>> quantize_parametric(x, format_parameters(E2M1))
        tensor([ 0.5000,  1.0000, -3.0000])
    """
    fmt = as_format(fmt)
    plan = make_plan(fmt, FLOAT_DTYPES["float32"], NEAREST, FINITE)
    if plan is None or not plan.is_narrow:
        raise ValueError(
            f"fmt is {fmt!r}; as parameters go formats with subnormal numbers, of up to 7 exponent "
            "and 21 mantissa bits and not near the ends of float32"
        )
    grid = grid_of(fmt, FLOAT_DTYPES["float32"])
    signed = -0.0 if fmt.signed else 0.0
    neutral = -0.0 if fmt.has_negative_zero else 0.0
    numbers = (
        grid.low,
        grid.high,
        grid.floor,
        grid.ceiling,
        grid.magic,
        float(grid.ties_by_parity),
        signed,
        neutral,
    )
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def quantize_parametric(x: Tensor, parameters: Tensor) -> Tensor:
    """Round to the nearest value of a format given as a tensor, bit for bit as `quantize` does.

    Args:
        x: Tensor of float16, bfloat16 or float32, of any shape.
        parameters: The result of `format_parameters`, on the device of `x`.

    Returns:
        Tensor of the shape and dtype of `x`; its gradient passes straight through.

    Raises:
        TypeError: If `x` is not a tensor of one of these dtypes.
        ValueError: If `parameters` is not a float32 tensor of shape (8,).

    Example:
        >>> from fpformats import E2M1U
        >>> quantize_parametric(torch.tensor([-1.0, 2.4]), format_parameters(E2M1U))
        tensor([0., 2.])
    """
    if not is_tensor(x) or float_dtype_of(x).name == "float64":
        raise TypeError(
            f"x is of {getattr(x, 'dtype', type(x))}; it must be a tensor up to float32"
        )
    if parameters.shape != (COUNT,) or parameters.dtype != torch.float32:
        shape, dtype = tuple(parameters.shape), parameters.dtype
        raise ValueError(
            f"parameters is of {dtype} and shape {shape}; format_parameters makes them"
        )
    rounded = _round(x.detach().to(torch.float32), parameters).to(x.dtype)
    if not needs_gradient(x, out=None):
        return rounded
    from fpformats.ops.gradients import straight_through

    return straight_through(rounded, x, None)


def _round(x: Tensor, parameters: Tensor) -> Tensor:
    """Round as `fpformats.kernels.portable` does, but without branches on the format."""
    low, high, floor, ceiling, magic, by_parity, sign, neutral = parameters.unbind()
    y = torch.clamp(x, low, high)
    binade = torch.clamp((y.view(torch.int32) & 0x7F800000).view(torch.float32), floor, ceiling)
    even = ((binade.view(torch.int32) - floor.view(torch.int32)) >> 23) & by_parity.to(torch.int32)
    spacing = binade * magic
    y = ((y.view(torch.int32) - even).view(torch.float32) + spacing) - spacing
    magnitude = y.view(torch.int32) & 0x7FFFFFFF
    signed = magnitude | (x.view(torch.int32) & sign.view(torch.int32))
    return signed.view(torch.float32) + neutral
