"""Scales and zero points: their checks, and the scale of each element.

The shape of the scale sets the granularity. A number is one scale for the tensor. Shape
(C, 1, 1, 1) is one scale for each of C channels, by broadcasting. A block size has one number for
each dimension; every block of that size then has a scale.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fpformats.engine.arrays import (
    cast,
    contiguous,
    float_dtype_of,
    is_compiling,
    is_hidden,
    is_plain_tensor,
    is_tensor,
    take_blocks,
)
from fpformats.kernels.layout import Layout

if TYPE_CHECKING:
    from fpformats.kernels.grid import FloatDtype


class Scales(NamedTuple):
    """Checked scales and zero points of an array.

    Attributes:
        scale: Array of the dtype. It broadcasts to the shape or, with blocks, has one entry for
            each block.
        zero_point: Likewise, or None.
        block_size: Sizes of blocks by dimension, at least 1; None without blocks.
    """

    scale: Any
    zero_point: Any
    block_size: tuple[int, ...] | None


def make_scales(
    x: Any,
    scale: Any,
    zero_point: Any,
    block_size: tuple[int, ...] | None,
    dtype: FloatDtype,
    shape: tuple[int, ...] | None = None,
) -> Scales:
    """Check scales and zero points against the data that they scale.

    Args:
        x: Array, tensor or number.
        scale: Number, or array of the library of `x`.
        zero_point: Likewise, or None.
        block_size: Sizes of the blocks that share a scale, by dimension; None for broadcasting.
        dtype: The compute dtype.
        shape: Shape of the scaled data, if it is not that of `x`.

    Returns:
        Scales and zero points in the dtype.

    Raises:
        TypeError: If one is not floating point, of another library, or wider than the dtype.
        ValueError: If a shape does not fit, a scale is not positive and finite or a zero point
            not finite.
    """
    shape = tuple(getattr(x, "shape", ())) if shape is None else shape
    sizes = None if block_size is None else block_lengths(block_size, shape)

    def parameter(argument: str, value: Any) -> Any:
        return _parameter(argument, value, x, dtype, shape, sizes)

    zeros = None if zero_point is None else parameter("zero_point", zero_point)
    return Scales(parameter("scale", scale), zeros, sizes)


def check_number(argument: str, value: float) -> None:
    """Raise ValueError unless a number is a scale (positive and finite) or a finite zero point."""
    if argument == "scale" and not 0 < value < math.inf:
        raise ValueError(f"scale is {value}; it must be positive and finite")
    if not abs(value) < math.inf:
        raise ValueError(f"zero_point is {value}; it must be finite")


def block_lengths(block_size: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the sizes of blocks along the dimensions of a shape; -1 stands for the whole length.

    Raises:
        ValueError: If there is not one size for each dimension, or one is not an integer above 0.
    """
    if (
        not isinstance(block_size, (tuple, list))
        or len(block_size) != len(shape)
        or any(type(size) is not int or size < -1 or size == 0 for size in block_size)
    ):
        raise ValueError(
            f"block_size is {block_size}; it must hold a positive integer or -1 for each of the "
            f"{len(shape)} dimensions"
        )
    pairs = zip(block_size, shape, strict=True)
    return tuple(max(length, 1) if size == -1 else size for size, length in pairs)


def spread(scales: Scales, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Give scales and zero points (or None) as arrays that broadcast to a shape."""
    scale, zero_point, block_size = scales
    return repeat(scale, shape, block_size), repeat(zero_point, shape, block_size)


def repeat(value: Any, shape: tuple[int, ...], block_size: tuple[int, ...] | None) -> Any:
    """Repeat scales for the elements of their blocks; torch keeps the gradient.

    Args:
        value: Array with an entry for each block, array that broadcasts, number or None.
        shape: Shape of the scaled data.
        block_size: Sizes of blocks as in `Scales`.

    Returns:
        A value that broadcasts to the shape, or None.
    """
    if block_size is None or getattr(value, "ndim", 0) == 0:
        return value
    for axis, (size, length) in enumerate(zip(block_size, shape, strict=True)):
        if size > 1:
            value = take_blocks(value, size, axis, length)
    return value


def lay_out(scales: Scales, shape: tuple[int, ...]) -> tuple[Any, Any, Layout]:
    """Give scales and zero points in contiguous memory, with the layout that assigns them.

    Args:
        scales: The scales.
        shape: Shape of the scaled data.

    Returns:
        Contiguous scales, contiguous zero points or None, and the layout of both.
    """
    scale, zero_point, block_size = scales
    layout = _layout(scale, shape, block_size)
    if zero_point is not None and (layout is None or scale.shape != zero_point.shape):
        scale, zero_point = _alike(scale, zero_point, shape, block_size)
        layout, block_size = _layout(scale, shape, None), None
    if layout is None:
        scale = _full_shape(repeat(scale, shape, block_size), shape)
        if zero_point is not None:
            zero_point = _full_shape(repeat(zero_point, shape, block_size), shape)
        layout = Layout(max(math.prod(shape), 1), 1, 0)
    return contiguous(scale), None if zero_point is None else contiguous(zero_point), layout


def _layout(
    scale: Any, shape: tuple[int, ...], block_size: tuple[int, ...] | None
) -> Layout | None:
    """Give the layout of scales; None if they must be repeated to have one."""
    total = max(math.prod(shape), 1)
    if math.prod(scale.shape) == 1:
        return Layout(total, total, 0)
    if block_size is not None and scale.ndim:
        whole = all(size == 1 for size in block_size[:-1])
        return Layout(max(shape[-1], 1), block_size[-1], scale.shape[-1]) if whole else None
    varies = [size != 1 for size in (1,) * (len(shape) - scale.ndim) + tuple(scale.shape)]
    first, last = varies.index(True), len(varies) - varies[::-1].index(True)
    if not all(v or shape[axis] == 1 for axis, v in enumerate(varies[:last]) if axis >= first):
        return None
    run = math.prod(shape[last:])
    return Layout(max(math.prod(shape[first:]), 1), max(run, 1), 0)


def _alike(
    scale: Any, zero_point: Any, shape: tuple[int, ...], block_size: tuple[int, ...] | None
) -> tuple[Any, Any]:
    """Give scales and zero points one common shape, the smallest possible."""
    pair = (repeat(scale, shape, block_size), repeat(zero_point, shape, block_size))
    common = np.broadcast_shapes(*(tuple(value.shape) for value in pair))
    return _full_shape(pair[0], common), _full_shape(pair[1], common)


def _full_shape(value: Any, shape: tuple[int, ...]) -> Any:
    return value.expand(shape) if is_tensor(value) else np.broadcast_to(value, shape)


def _parameter(
    argument: str,
    value: Any,
    x: Any,
    dtype: FloatDtype,
    shape: tuple[int, ...],
    block_size: tuple[int, ...] | None,
) -> Any:
    """Give a scale or zero point as an array in the dtype, checked against `x`."""
    if isinstance(value, (int, float, np.floating)) and not isinstance(value, bool):
        if is_compiling():  # torch.compile traces NumPy's operations on constants too
            check_number(argument, float(value))
            return _full(float(value), x, dtype)
        number = np.asarray(value, dtype=dtype.name)
        _check_range(argument, number)
        return _full(float(number), x, dtype) if is_tensor(x) else number
    array = _converted(argument, value, x, dtype)
    _check_shape(argument, tuple(array.shape), shape, block_size)
    if not is_hidden(array):
        _check_range(argument, array.numpy() if is_plain_tensor(array) else array)
    return array


def _full(value: float, x: Any, dtype: FloatDtype) -> Any:
    # A tensor on the device, because torch multiplies by the reciprocal of a number on the host.
    torch = sys.modules["torch"]
    return torch.full((), value, dtype=getattr(torch, dtype.name), device=x.device)


def _converted(argument: str, value: Any, x: Any, dtype: FloatDtype) -> Any:
    given = float_dtype_of(value, argument)
    if is_tensor(value) != is_tensor(x):
        raise TypeError(f"{argument} is a {type(value).__name__}; x is a {type(x).__name__}")
    if given.mantissa_bits > dtype.mantissa_bits:
        raise TypeError(
            f"{argument} is of {given.name}, but the operations are in {dtype.name}; convert it"
        )
    if is_tensor(value):
        return cast(value.detach(), dtype.name).to(x.device)
    return np.asarray(value, dtype=dtype.name)


def _check_shape(
    argument: str, given: tuple[int, ...], shape: tuple[int, ...], sizes: tuple[int, ...] | None
) -> None:
    if sizes is not None:
        expected = tuple(-(-n // size) for size, n in zip(sizes, shape, strict=True))
        if given != expected:
            raise ValueError(f"{argument} has shape {given}; blocks of {sizes} need {expected}")
        return
    ends = zip(reversed(given), reversed(shape), strict=False)
    if len(given) > len(shape) or any(size not in (1, wanted) for size, wanted in ends):
        raise ValueError(f"{argument} has shape {given}, which does not broadcast to {shape}")


def _check_range(argument: str, array: Any) -> None:
    if argument == "scale":
        if not bool(((array > 0) & (array < math.inf)).all()):
            raise ValueError("scale must be positive and finite everywhere")
    elif not bool((abs(array) < math.inf).all()):
        raise ValueError("zero_point must be finite everywhere")
