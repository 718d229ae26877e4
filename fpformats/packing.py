"""Storing codes of any width without gaps.

Codes follow one another from the lowest bit of the first byte on (little-endian bit order): two
4-bit codes share a byte with the first in the low half, as in torch.float4_e2m1fn_x2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fpformats.operands import cast, check_codes, library_of

if TYPE_CHECKING:
    from types import ModuleType

MAX_BITS = 16


def pack(codes: Any, bits: int) -> Any:
    """Store codes side by side.

    Args:
        codes: Array or tensor of any integer dtype and any shape, taken in row-major order.
        bits: Width of a code, 1 to 16.

    Returns:
        One-dimensional uint8 array of ceil(count * bits / 8) bytes, of the library and device
        of `codes`; unused high bits of the last byte are 0.

    Raises:
        TypeError: If `codes` is not an integer array or tensor.
        ValueError: If `bits` is out of range, or a code does not fit (not looked at under
            torch.compile).

    Example:
        >>> import numpy as np
        >>> pack(np.array([[1, 2], [3, 15]]), 4).tolist()
        [33, 243]
    """
    _check_bits(bits)
    if isinstance(codes, int):
        raise TypeError("codes is an int; it must be an array or a tensor")
    check_codes(codes, bits, f"a width of {bits} bits")
    flat = cast(codes.reshape(-1), "int32")
    packed = _regroup(library_of(codes), flat, bits, 8)
    return cast(packed[: _byte_count(flat.shape[0], bits)], "uint8")


def unpack(packed: Any, bits: int, shape: tuple[int, ...] | int) -> Any:
    """Take codes out of the bytes that `pack` gave.

    Args:
        packed: One-dimensional uint8 array or tensor.
        bits: Width of a code, 1 to 16.
        shape: Shape of the codes, or their number.

    Returns:
        Array of the shape, uint8 up to 8 bits and uint16 beyond, of the library and device of
        `packed`.

    Raises:
        TypeError: If `packed` is not a uint8 array or tensor.
        ValueError: If `bits` is out of range, or `packed` is not of as many bytes as `shape`
            takes.

    Example:
        >>> import numpy as np
        >>> unpack(np.array([33, 243], dtype=np.uint8), 4, (2, 2)).tolist()
        [[1, 2], [3, 15]]
    """
    _check_bits(bits)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    _check_packed(packed, _byte_count(count, bits), f"{count} codes of {bits} bits")
    codes = _regroup(library_of(packed), cast(packed, "int32"), 8, bits)
    return cast(codes[:count].reshape(shape), "uint8" if bits <= 8 else "uint16")


def _regroup(xp: ModuleType, fields: Any, width: int, new_width: int) -> Any:
    """Cut the bits of a row of fields into fields of another width, zeros filling the last."""
    group = math.lcm(width, new_width)
    rows = _padded(xp, fields, group // width).reshape(-1, group // width)
    columns = []
    for start in range(0, group, new_width):
        column = 0
        for index in range(start // width, -(-(start + new_width) // width)):
            shift = index * width - start
            field = rows[:, index]
            column = column | (field << shift if shift >= 0 else field >> -shift)
        columns.append(column & ((1 << new_width) - 1))
    return xp.stack(columns, axis=1).reshape(-1)


def _byte_count(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _padded(xp: ModuleType, flat: Any, multiple: int) -> Any:
    missing = -flat.shape[0] % multiple
    if missing == 0:
        return flat
    padding = xp.zeros_like(flat[:1]).repeat(missing)
    return xp.concatenate([flat, padding])


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits!r}; it must be an integer from 1 to {MAX_BITS}")


def _check_packed(packed: Any, expected: int, what: str) -> None:
    name = str(getattr(packed, "dtype", type(packed).__name__)).removeprefix("torch.")
    if name != "uint8":
        raise TypeError(f"packed is of type {name}; it must be uint8")
    if packed.ndim != 1 or packed.shape[0] != expected:
        raise ValueError(
            f"packed has shape {tuple(packed.shape)}; {what} take {expected} bytes in one dimension"
        )
