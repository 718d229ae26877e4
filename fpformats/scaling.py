"""Rounding to a format that is scaled and shifted: s * round((x - z) / s) + z.

The definition is those floating-point operations in that order, each rounded on its own, with
true division and no fused multiply-add, in float32 (float64 for float64 values). Without a zero
point z there is no subtraction and no addition.

Granularity is the shape of the scale. A number is one scale for the tensor; shape (C, 1, 1, 1) is
one for each of C channels, by broadcasting. With ``block_size``, one number for each dimension,
every block of that size has a scale, and the scale has ceil(length / block) entries along each
dimension: (1, 64) makes groups of 64 along rows, (128, 128) square blocks, and -1 stands for the
whole length. Blocks at the ends are cut short.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from fpformats import convert
from fpformats.operands import (
    carrier_named,
    carrier_of,
    cast,
    check_out,
    grid_of,
    is_hidden,
    is_tensor,
    library_of,
    narrowed,
    needs_gradient,
    quiet,
    shaped,
    take_blocks,
    widened,
    working_carrier,
)

if TYPE_CHECKING:
    from fpformats.formats import FloatFormat
    from fpformats.kernels.grid import Carrier


def quantize_scaled(
    x: Any,
    fmt: FloatFormat,
    scale: Any,
    zero_point: Any = None,
    *,
    block_size: tuple[int, ...] | None = None,
    clip_gradient: bool = False,
    out: Any = None,
) -> Any:
    """Round to the values of a format times `scale` plus `zero_point`.

    With v = (x - z) / s and q its rounded value, gradients of s * q + z are those of learned
    step sizes (LSQ, arXiv 1902.08153): where v is in the format's range, 1 for x, q - v for the
    scale and 0 for the zero point; beyond it 1 (0 with `clip_gradient`), q and 1.

    Args:
        x: Array, tensor or number of float16, bfloat16, float32 or float64. The two narrow ones
            are computed in float32, and the result is rounded to them.
        fmt: The format.
        scale: Positive and finite; number, or array of the library of `x` that broadcasts to
            its shape. Numbers are rounded to float32 (float64 where `x` is).
        zero_point: Finite; as `scale`, or None for no shift.
        block_size: Sizes of the blocks that share a scale and a zero point, by dimension.
        clip_gradient: Whether the gradient of `x` is zero beyond the format's range.
        out: Array or tensor of the kind, shape and dtype of `x` to write to; may be `x`.

    Returns:
        Values of the kind, shape, dtype and device of `x`, or `out`.

    Raises:
        TypeError: If an argument is not floating point, or of a dtype wider than the operations.
        ValueError: If `scale` is not positive and finite or `zero_point` not finite (not looked
            at under torch.compile), a shape does not broadcast, the format does not fit into the
            operations' dtype, or `out` has another shape or device, or would cut off a gradient.

    Example:
        >>> from fpformats import E2M1
        >>> quantize_scaled(1.0, E2M1, 0.75)
        1.125
    """
    carrier = working_carrier(carrier_of(x))
    grid = grid_of(fmt, carrier)
    scale = _spread("scale", scale, x, block_size)
    zero_point = _spread("zero_point", zero_point, x, block_size)
    scales = _parameter("scale", scale, x, carrier)
    shifts = _parameter("zero_point", zero_point, x, carrier)
    check_out(out, x)
    with quiet():
        v = _unscaled(widened(x, carrier), scales, shifts)
        q = convert.rounded(library_of(x), v, grid)
        if needs_gradient(x, scale, zero_point, out=out):
            from fpformats.gradients import learned_step

            result = narrowed(_rescaled(q.clone(), scales, shifts), x)
            inside = (v >= grid.low) & (v <= grid.high)
            return learned_step(result, (x, scale, zero_point), v, q, inside, clip_gradient)
        return narrowed(_rescaled(q, scales, shifts), x, out)


def encode_scaled(
    x: Any,
    fmt: FloatFormat,
    scale: Any,
    zero_point: Any = None,
    *,
    block_size: tuple[int, ...] | None = None,
    nan: int | None = None,
) -> Any:
    """Round to the codes of a format, after a shift and a division by the scale.

    `decode_scaled` takes the codes to what `quantize_scaled` gives, bit for bit.

    Args:
        x: As in `quantize_scaled`.
        fmt: The format.
        scale: As in `quantize_scaled`.
        zero_point: As in `quantize_scaled`.
        block_size: As in `quantize_scaled`.
        nan: Code to give for NaN, as in `fpformats.encode`.

    Returns:
        Codes in the smallest unsigned integer dtype that has `fmt.bits` bits.

    Raises:
        TypeError: As in `quantize_scaled`.
        ValueError: As in `quantize_scaled` and `fpformats.encode`.

    Example:
        >>> from fpformats import E2M1
        >>> encode_scaled(1.0, E2M1, 0.75)
        3
    """
    carrier = working_carrier(carrier_of(x))
    scale = _spread("scale", scale, x, block_size)
    zero_point = _spread("zero_point", zero_point, x, block_size)
    scales = _parameter("scale", scale, x, carrier)
    shifts = _parameter("zero_point", zero_point, x, carrier)
    with quiet():
        v = _unscaled(widened(x, carrier), scales, shifts)
    codes = convert.encode(v, fmt, nan=nan)
    return shaped(codes, x)


def decode_scaled(
    codes: Any,
    fmt: FloatFormat,
    scale: Any,
    zero_point: Any = None,
    dtype: Any = "float32",
    *,
    block_size: tuple[int, ...] | None = None,
) -> Any:
    """Give the values of codes, times the scale, plus the zero point.

    Args:
        codes: Array or tensor of any integer dtype and any shape, or an int.
        fmt: The format.
        scale: As in `quantize_scaled`, broadcasting to the shape of `codes`.
        zero_point: As in `quantize_scaled`, broadcasting to the shape of `codes`.
        dtype: Carrier of the result; float16 and bfloat16 are computed in float32 and rounded.
        block_size: As in `quantize_scaled`.

    Returns:
        Values of the dtype, of the kind, shape and device of `codes`; a float for an int.

    Raises:
        TypeError: As in `quantize_scaled` and `fpformats.decode`.
        ValueError: As in `quantize_scaled` and `fpformats.decode`.

    Example:
        >>> from fpformats import E2M1
        >>> decode_scaled(3, E2M1, 0.75)
        1.125
    """
    carrier = carrier_named(dtype)
    working = working_carrier(carrier)
    scale = _spread("scale", scale, codes, block_size)
    zero_point = _spread("zero_point", zero_point, codes, block_size)
    scales = _parameter("scale", scale, codes, working)
    shifts = _parameter("zero_point", zero_point, codes, working)
    values = convert.decode(codes, fmt, working.name)
    if not is_tensor(codes):
        values = np.atleast_1d(np.asarray(values, working.name))
    with quiet():
        return shaped(cast(_rescaled(values, scales, shifts), carrier.name), codes)


def block_lengths(block_size: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """Give the sizes of blocks along the dimensions of a shape, -1 being the whole length.

    Raises:
        ValueError: If there is not one size for each dimension, or one is not an integer above 0.
    """
    if len(block_size) != len(shape) or any(
        type(size) is not int or size < -1 or size == 0 for size in block_size
    ):
        raise ValueError(
            f"block_size is {block_size}; it must hold a positive integer or -1 for each of the "
            f"{len(shape)} dimensions"
        )
    return [
        max(length, 1) if size == -1 else size
        for size, length in zip(block_size, shape, strict=True)
    ]


def _unscaled(x: Any, scale: Any, zero_point: Any) -> Any:
    if zero_point is None:
        return x / scale
    v = x - zero_point
    if is_hidden(scale):
        return v / scale  # vmap may have a dimension for the scale that v lacks
    v /= scale
    return v


def _rescaled(q: Any, scale: Any, zero_point: Any) -> Any:
    q *= scale
    if zero_point is not None:
        q += zero_point
    return q


def _spread(argument: str, value: Any, x: Any, block_size: tuple[int, ...] | None) -> Any:
    """Repeat a scale or zero point for the elements of its blocks; torch keeps the gradient."""
    shape = tuple(getattr(x, "shape", ()))
    if block_size is None or not hasattr(value, "shape"):
        return value
    sizes = block_lengths(block_size, shape)
    expected = tuple(-(-length // size) for size, length in zip(sizes, shape, strict=True))
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{argument} has shape {tuple(value.shape)}; blocks of {block_size} need {expected}"
        )
    for axis, (size, length) in enumerate(zip(sizes, shape, strict=True)):
        if size > 1:
            value = take_blocks(value, size, axis, length)
    return value


def _parameter(argument: str, value: Any, x: Any, carrier: Carrier) -> Any:
    """Give a scale or zero point as an array in the carrier, checked against `x`."""
    if value is None and argument == "zero_point":
        return None
    shape = tuple(getattr(x, "shape", ()))
    if isinstance(value, int | float | np.floating) and not isinstance(value, bool):
        array = _full(float(value), x, carrier)
    else:
        array = _converted(argument, value, x, carrier)
        if not _broadcasts(tuple(array.shape), shape):
            raise ValueError(
                f"{argument} has shape {tuple(array.shape)}, which does not broadcast to {shape}"
            )
    if not is_hidden(array):
        _check_range(argument, array)
    return array


def _full(value: float, x: Any, carrier: Carrier) -> Any:
    if is_tensor(x):
        # A tensor on the device: torch multiplies by the reciprocal of a number from the host.
        torch = sys.modules["torch"]
        return torch.full((), value, dtype=getattr(torch, carrier.name), device=x.device)
    return np.asarray(value, dtype=carrier.name)


def _converted(argument: str, value: Any, x: Any, carrier: Carrier) -> Any:
    given = carrier_of(value, argument)
    if is_tensor(value) != is_tensor(x):
        raise TypeError(f"{argument} is a {type(value).__name__}; x is a {type(x).__name__}")
    if given.mantissa_bits > carrier.mantissa_bits:
        raise TypeError(
            f"{argument} is of {given.name}, but the operations are in {carrier.name}; convert it"
        )
    if is_tensor(value):
        return cast(value.detach(), carrier.name).to(x.device)
    return np.asarray(value, dtype=carrier.name)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    ends = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in ends)


def _check_range(argument: str, array: Any) -> None:
    finite = abs(array) < math.inf
    if argument == "scale":
        if not bool((finite & (array > 0)).all()):
            raise ValueError("scale must be positive and finite everywhere")
    elif not bool(finite.all()):
        raise ValueError("zero_point must be finite everywhere")
