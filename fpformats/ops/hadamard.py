"""Hadamard transforms, which spread outliers among numbers before they are rounded."""

from __future__ import annotations

import math
from typing import Any

from fpformats.engine.arrays import (
    cast,
    compute_dtype,
    float_dtype_of,
    is_plain_tensor,
    is_tensor,
    library_of,
    needs_gradient,
)
from fpformats.engine.hadamard import transform
from fpformats.ops.blocks import checked_axis

MOST = 1024
"""Largest size of a transform."""


def hadamard(x: Any, size: int, *, axis: int = -1) -> Any:
    """Multiply groups of numbers by the orthogonal Hadamard matrix of Sylvester.

    The matrix is symmetric, so that a second transform gives the numbers back, but for rounding.
    Sums are formed by butterflies: for the distances 1, 2, 4, ... size / 2, in this order, numbers
    a and b at that distance become a + b and a - b. Then they are multiplied by 1 / sqrt(size).
    Each operation is rounded once, in float32 (float64 for float64), so that all libraries, devices
    and memory layouts give the same bits. For sizes 4, 16, 64, 256 and 1024 the factor is exact.

    Args:
        x: Array or tensor of float16, bfloat16, float32 or float64.
        size: Size of the groups, a power of two up to 1024 that divides the length of the axis.
        axis: The axis along which adjacent numbers form groups.

    Returns:
        The products, of the shape, dtype, library and device of `x`. Gradients pass.

    Raises:
        TypeError: If `x` is not a floating-point array or tensor.
        ValueError: If `axis` is out of range, or the size is none of those.

    Example:
        >>> import numpy as np
        >>> hadamard(np.array([8.0, 0.0, 0.0, 0.0]), 4)
        array([4., 4., 4., 4.])
        >>> hadamard(np.array([4.0, 4.0, 4.0, 4.0]), 4)
        array([8., 0., 0., 0.])
    """
    axis = checked_axis(x, tuple(getattr(x, "shape", ())), axis)
    dtype, length = float_dtype_of(x), x.shape[axis]
    if type(size) is not int or not 0 < size <= MOST or size & (size - 1) or length % size:
        raise ValueError(
            f"size is {size!r}; it must be a power of two up to {MOST} that divides the length "
            f"{length} of the axis"
        )
    working = compute_dtype(dtype).name
    if is_tensor(x) and needs_gradient(x, out=None):
        if is_plain_tensor(x):
            from fpformats.ops.gradients import self_adjoint

            return self_adjoint(x, lambda each: hadamard(each, size, axis=axis))
        return cast(_butterflies(cast(x, working), size, axis), dtype.name)
    wide = cast(x.detach() if is_tensor(x) else x, working)
    y = transform(wide, size, axis, 1 / math.sqrt(size))
    return cast(_butterflies(wide, size, axis) if y is None else y, dtype.name)


def _butterflies(x: Any, size: int, axis: int) -> Any:
    """Transform by operations of the library."""
    xp, shape = library_of(x), tuple(x.shape)
    before, rest, y = shape[:axis], shape[axis + 1 :], x
    here = (slice(None),) * (axis + 1)
    distance = 1
    while distance < size:
        pairs = y.reshape(*before, shape[axis] // (2 * distance), 2, distance, *rest)
        low, high = pairs[(*here, 0)], pairs[(*here, 1)]
        y = xp.stack([low + high, low - high], axis + 1)
        distance *= 2
    return y.reshape(shape) * (1 / math.sqrt(size))
