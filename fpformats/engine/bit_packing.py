"""Storing codes of any width without gaps.

Codes start at the lowest bit of the first byte (little-endian bit order). Two 4-bit codes share a
byte, with the first in the low half, as in torch.float4_e2m1fn_x2.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

from fpformats.engine.arrays import cast, check_codes, library_of, padded

if TYPE_CHECKING:
    from types import ModuleType

MAX_BITS = 16


def pack(codes: Any, bits: int, *, axis: int | None = None) -> Any:
    """Store codes side by side.

    Args:
        codes: Array or tensor of any integer dtype and any shape.
        bits: Width of a code, 1 to 16.
        axis: The axis along which codes share bytes; by default all codes are taken in
            row-major order.

    Returns:
        uint8 array of the library and device of `codes`. The n codes along the axis become
        ceil(n * bits / 8) bytes, and the other dimensions are kept. Without an axis, the result is
        one-dimensional. Unused high bits of the last byte are 0.

    Raises:
        TypeError: If `codes` is not an integer array or tensor.
        ValueError: If `bits` or `axis` is out of range, or a code does not fit (not checked
            under torch.compile).

    Example:
        >>> import numpy as np
        >>> pack(np.array([[1, 2], [3, 15]]), 4).tolist()
        [33, 243]
        >>> pack(np.array([[1, 2], [3, 15]]), 4, axis=0).tolist()
        [[49, 242]]
    """
    _check_bits(bits)
    if isinstance(codes, int):
        raise TypeError("codes is an int; it must be an array or a tensor")
    check_codes(codes, bits, f"a width of {bits} bits")
    xp = library_of(codes)
    if axis is None:
        codes, axis = codes.reshape(-1), 0
    _check_axis(axis, codes.ndim)
    rows = cast(xp.swapaxes(codes, axis, -1), "int32")
    packed = _regroup(xp, rows, bits, 8)[..., : _byte_count(rows.shape[-1], bits)]
    return xp.swapaxes(cast(packed, "uint8"), -1, axis)


def unpack(packed: Any, bits: int, *, shape: tuple[int, ...] | int, axis: int | None = None) -> Any:
    """Extract codes from the bytes that `pack` returned.

    Args:
        packed: uint8 array or tensor.
        bits: Width of a code, 1 to 16.
        shape: Shape of the codes, or their number.
        axis: The axis that was given to `pack`.

    Returns:
        Array of the shape, uint8 up to 8 bits and uint16 beyond, of the library and device of
        `packed`.

    Raises:
        TypeError: If `packed` is not a uint8 array or tensor.
        ValueError: If `bits` or `axis` is out of range, or `packed` does not have the number of
            bytes that `shape` needs.

    Example:
        >>> import numpy as np
        >>> unpack(np.array([33, 243], dtype=np.uint8), 4, shape=(2, 2)).tolist()
        [[1, 2], [3, 15]]
    """
    _check_bits(bits)
    xp = library_of(packed)
    if axis is None:
        shape = checked_packed(packed, bits, shape)
        count = math.prod(shape)
        codes = _regroup(xp, cast(packed, "int32"), 8, bits)[:count].reshape(shape)
    else:
        shape = checked_shape(shape)
        _check_axis(axis, len(shape))
        stored = list(shape)
        stored[axis] = _byte_count(shape[axis], bits)
        _check_packed(packed, tuple(stored), f"{shape} codes of {bits} bits")
        rows = cast(xp.swapaxes(packed, axis, -1), "int32")
        codes = xp.swapaxes(_regroup(xp, rows, 8, bits)[..., : shape[axis]], -1, axis)
    return cast(codes, "uint8" if bits <= 8 else "uint16")


def checked_shape(shape: object) -> tuple[int, ...]:
    """Give a shape, or a number of elements, as a tuple.

    Raises:
        ValueError: If it holds anything but integers of 0 or more.
    """
    lengths = shape if isinstance(shape, (tuple, list)) else (shape,)
    try:
        known = tuple(operator.index(length) for length in lengths)
    except TypeError:
        known = (-1,)
    if min(known, default=0) < 0:
        raise ValueError(f"shape is {shape!r}; it must hold integers of 0 or more")
    return known


def checked_packed(packed: Any, bits: int, shape: tuple[int, ...] | int) -> tuple[int, ...]:
    """Give the shape of packed codes, after a check that the number of bytes fits it.

    Raises:
        TypeError: If `packed` is not a uint8 array or tensor.
        ValueError: If it has another number of bytes or more than one dimension, or codes of this
            width cannot be packed.
    """
    _check_bits(bits)
    shape = checked_shape(shape)
    count = math.prod(shape)
    _check_packed(packed, (_byte_count(count, bits),), f"{count} codes of {bits} bits")
    return shape


def _regroup(xp: ModuleType, rows: Any, width: int, new_width: int) -> Any:
    """Regroup rows of bit fields into fields of another width; zeros fill up the last one."""
    group = math.lcm(width, new_width)
    rows = padded(xp, rows, group // width)
    shape = (*rows.shape[:-1], rows.shape[-1] * width // group)
    rows = rows.reshape(*shape, group // width)
    columns = []
    for start in range(0, group, new_width):
        column = 0
        for index in range(start // width, -(-(start + new_width) // width)):
            shift = index * width - start
            field = rows[..., index]
            column = column | (field << shift if shift >= 0 else field >> -shift)
        columns.append(column & ((1 << new_width) - 1))
    return xp.stack(columns, -1).reshape(*shape[:-1], shape[-1] * group // new_width)


def _byte_count(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits!r}; it must be an integer from 1 to {MAX_BITS}")


def _check_axis(axis: int, dimensions: int) -> None:
    if type(axis) is not int or not -dimensions <= axis < dimensions:
        raise ValueError(f"axis is {axis!r}; there are {dimensions} dimensions")


def _check_packed(packed: Any, expected: tuple[int, ...], what: str) -> None:
    name = str(getattr(packed, "dtype", type(packed).__name__)).removeprefix("torch.")
    if name != "uint8":
        raise TypeError(f"packed is of type {name}; it must be uint8")
    if tuple(packed.shape) != expected:
        raise ValueError(
            f"packed has shape {tuple(packed.shape)}; {what} take {math.prod(expected)} bytes "
            f"of shape {expected}"
        )
