"""Data as rows that share a scale: one row for a tensor, or one for each channel or block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fpformats.engine.arrays import float_dtype_of, is_tensor, widened
from fpformats.engine.scales import block_lengths
from fpformats.kernels.grid import FLOAT_DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fpformats.kernels.grid import FloatDtype

MAX_EXPONENT = 500
"""The largest magnitude must be from 2**-500 to 2**500, so that float64 holds sums of squares."""


def block_sizes(
    axis: int | None, block_size: tuple[int, ...] | None, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Give the sizes of the blocks that share a scale, along each dimension of a shape.

    Args:
        axis: Axis along which every index has its own scale; None for none.
        block_size: Sizes as `quantize_scaled` takes them; None for one block.
        shape: Shape of the data.

    Returns:
        One positive size for each dimension.

    Raises:
        ValueError: If both are given, or one does not fit the shape.
    """
    if axis is not None and block_size is not None:
        raise ValueError("axis and block_size are given; only one of them can say what has a scale")
    if axis is not None:
        if type(axis) is not int or not -len(shape) <= axis < len(shape):
            raise ValueError(f"axis is {axis!r}; x has {len(shape)} dimensions")
        return tuple(1 if i == axis % len(shape) else max(n, 1) for i, n in enumerate(shape))
    return block_lengths((-1,) * len(shape) if block_size is None else block_size, shape)


def as_rows(
    x: Any, weights: Any, dtype: FloatDtype, sizes: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """Give data and their weights as rows that share a scale.

    Args:
        x: Array, tensor or number.
        weights: Array, tensor or number that broadcasts to the shape of `x`; None for 1.
        dtype: The dtype that `x` is widened to.
        sizes: Sizes of the blocks.

    Returns:
        Data of the dtype, and weights or None if all are 1; shape (rows, length). Elements that a
        short block lacks, and those of weight 0, are replaced by another value of the row, with
        weight 0.

    Raises:
        TypeError: If the weights are not floating point, or of another library than `x`.
        ValueError: If there are no data, data or weights are out of range, or do not broadcast.
    """
    data = _on_cpu(x, dtype)
    _check_data(data)
    w = None if weights is None else _checked_weights(weights, x)
    padding = [(0, -length % size) for size, length in zip(sizes, data.shape, strict=True)]
    if any(after for _, after in padding):
        w = np.pad(np.ones(data.shape) if w is None else w, padding)
        data = np.pad(data, padding)
    rows = _split(data, sizes)
    if w is None:
        return rows, None
    w = _split(w, sizes)
    present = w > 0
    fill = rows[np.arange(len(rows)), present.argmax(axis=1)] * present.any(axis=1)
    return np.where(present, rows, fill[:, None]), w


def _on_cpu(x: Any, dtype: FloatDtype) -> NDArray[Any]:
    wide = widened(x, dtype)
    array: NDArray[Any] = wide.cpu().numpy() if is_tensor(wide) else wide
    return array.reshape(getattr(x, "shape", ()))


def _check_data(data: NDArray[Any]) -> None:
    if data.size == 0 or not np.isfinite([data.min(), data.max()]).all():
        raise ValueError("x must hold at least one value and only finite ones")
    largest = float(max(-data.min(), data.max()))
    if largest and not 2.0**-MAX_EXPONENT <= largest <= 2.0**MAX_EXPONENT:
        raise ValueError(
            f"the largest magnitude in x is {largest}; it must be from 2**-{MAX_EXPONENT} to "
            f"2**{MAX_EXPONENT}, so that float64 holds its square"
        )


def _checked_weights(weights: Any, x: Any) -> NDArray[np.float64]:
    float_dtype_of(weights, "weights")
    if not isinstance(weights, float) and is_tensor(weights) != is_tensor(x):
        raise TypeError(f"weights is a {type(weights).__name__}; x is a {type(x).__name__}")
    array = _on_cpu(weights, FLOAT_DTYPES["float64"])
    shape = tuple(getattr(x, "shape", ()))
    try:
        array = np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"weights has shape {array.shape}, which does not broadcast to {shape}"
        ) from None
    if not ((array >= 0).all() and (array <= 2.0**MAX_EXPONENT).all()):
        raise ValueError(f"weights must be from 0 to 2**{MAX_EXPONENT} everywhere")
    return array


def _split(data: NDArray[Any], sizes: tuple[int, ...]) -> NDArray[Any]:
    """Give the blocks of an array as rows; every length must be a multiple of the block size."""
    pairs = [(n // size, size) for n, size in zip(data.shape, sizes, strict=True)]
    order = [*range(0, 2 * len(pairs), 2), *range(1, 2 * len(pairs), 2)]
    blocks = data.reshape([n for pair in pairs for n in pair]).transpose(order)
    return blocks.reshape(-1, math.prod(sizes))
