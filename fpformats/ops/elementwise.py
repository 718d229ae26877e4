"""Conversion between values of a dtype, values of a format, and codes.

All functions take NumPy arrays, torch tensors (on any device, of any shape and strides) and
single Python numbers, and return the same kind. Every result is rounded once, exactly as the
definition in `fpformats.exact` says.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fpformats.engine import cpu, dispatch
from fpformats.engine.arrays import (
    check_out,
    check_target,
    check_words,
    drawn,
    float_dtype_of,
    grid_of,
    needs_gradient,
    result_dtype,
)
from fpformats.engine.bit_packing import MAX_BITS, checked_packed
from fpformats.kernels.plan import code_dtype
from fpformats.parsing import as_format
from fpformats.rounding import DEFAULT, FINITE, NEAREST, make_policy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fpformats.formats import FloatFormat
    from fpformats.parsing import FormatLike


def quantize(
    x: Any,
    fmt: FormatLike,
    *,
    rounding: str = NEAREST,
    saturation: str = FINITE,
    random: Any = None,
    random_bits: int = 32,
    clip_gradient: bool = False,
    out: Any = None,
) -> Any:
    """Round to the values of a format, in the same dtype.

    Rounding and saturation follow IEEE P3109 (4.6): the input value is rounded once, and a result
    beyond the range is then saturated. By default, the nearest value is taken, with ties to the
    even code. Everything beyond the range, infinities included, becomes the nearest finite value,
    so negative numbers become 0 in an unsigned format. NaN stays NaN, and -0.0 stays -0.0 if the
    format has it.

    Args:
        x: Array, tensor or number of float16, bfloat16, float32 or float64, of any shape.
        fmt: The format, or its name.
        rounding: Name or member of `Rounding`.
        saturation: Name or member of `Saturation`.
        random: For the stochastic modes: a seed from 0 to 2**64 - 1; or a generator of NumPy or
            torch, from which a seed is drawn; or the random words, an array of integers of the
            library and shape of `x`. A seed gives each element a word by its position in
            row-major order, the same on every device.
        random_bits: Width of the random words, 1 to 32.
        clip_gradient: Whether the gradient is zero where `x` is beyond the range of the format.
            Otherwise the gradient of a tensor `x` that requires one passes straight through.
        out: Array or tensor of the kind, shape and dtype of `x` to write to; may be `x`.

    Returns:
        Rounded values of the kind, shape, dtype and device of `x`, or `out`.

    Raises:
        TypeError: If `x` is not floating point, `fmt` is not a format, or `out` is of another
            kind or dtype.
        ValueError: If the dtype of `x` cannot hold every value of the format, a mode is
            unknown, or `out` has another shape or device, or would cut off a gradient.

    Example:
        >>> from fpformats import E2M1, E2M1U
        >>> import numpy as np
        >>> quantize(np.array([0.3, 1.25, -2.6, 100.0]), E2M1)
        array([ 0.5,  1. , -3. ,  6. ])
        >>> quantize(np.array([0.3, 1.25, -2.6, 100.0]), E2M1U)
        array([0.5, 1. , 0. , 6. ])
    """
    if rounding is NEAREST and saturation is FINITE and random is None and random_bits == 32:
        policy = DEFAULT
    else:
        policy = make_policy(rounding, saturation, drawn(random), random_bits)
    # The short path knows formats that were used before, but no names.
    if policy is DEFAULT and (y := cpu.nearest(x, fmt, out)) is not None:
        return y
    fmt = as_format(fmt)
    grid = grid_of(fmt, float_dtype_of(x))
    check_out(out, x)
    check_words(policy.random, random_bits, x)
    learning = needs_gradient(x, out=out)
    y = dispatch.quantize(x, fmt, grid, policy, out=out)
    if not learning:
        return y
    from fpformats.ops.gradients import straight_through

    inside = (x >= grid.low) & (x <= grid.high) if clip_gradient else None
    return straight_through(y, x, inside)


def encode(
    x: Any,
    fmt: FormatLike,
    *,
    rounding: str = NEAREST,
    saturation: str = FINITE,
    random: Any = None,
    random_bits: int = 32,
    nan: int | None = None,
    packed: bool = False,
    out: Any = None,
) -> Any:
    """Round to the codes of a format.

    Args:
        x: Array, tensor or number of float16, bfloat16, float32 or float64, of any shape.
        fmt: The format, or its name.
        rounding: As in `quantize`.
        saturation: As in `quantize`.
        random: As in `quantize`.
        random_bits: As in `quantize`.
        nan: Code to give for NaN. By default the format's own NaN (`FloatFormat.nan_code`).
        packed: Whether to store the codes side by side, as `pack` does without an axis. The
            format may have up to 16 bits.
        out: Array or tensor of the shape and dtype of the result to write to. If an error is
            raised for NaN, it may have been written to.

    Returns:
        Codes in the smallest unsigned integer dtype that has `fmt.bits` bits, of the kind, shape
        and device of `x`; an int for a number. Packed codes are bytes in one dimension.

    Raises:
        TypeError: If `x` is not floating point, is a number and `packed` is True, or `out` is of
            another kind or dtype than the result.
        ValueError: If `x` contains NaN, the format has none and `nan` is None (under
            torch.compile, which hides the values, `nan` is required instead); if the dtype of
            `x` cannot hold every value of the format, an option is out of range, or `out` is of
            another shape or device.

    Example:
        >>> from fpformats import E2M1, E4M3
        >>> encode(-1.27, E2M1)
        11
        >>> encode(float("nan"), E4M3), encode(float("nan"), E2M1, nan=0)
        (127, 0)
        >>> import numpy as np
        >>> encode(np.array([0.5, 1.0, 6.0]), E2M1, packed=True)
        array([33,  7], dtype=uint8)
    """
    policy, fmt = make_policy(rounding, saturation, drawn(random), random_bits), as_format(fmt)
    grid = grid_of(fmt, float_dtype_of(x))
    nan_code = checked_nan_code(nan, fmt)
    check_words(policy.random, random_bits, x)
    check_packable(x, fmt, packed)
    check_codes_target(out, x, fmt, packed)
    return dispatch.encode(x, fmt, grid, policy, nan_code, packed, out=out)


def decode(
    codes: Any,
    fmt: FormatLike,
    *,
    dtype: Any = "float32",
    shape: tuple[int, ...] | int | None = None,
    out: Any = None,
) -> Any:
    """Give the values of codes.

    Args:
        codes: Array or tensor of any integer dtype and any shape, or an int.
        fmt: The format, or its name.
        dtype: Dtype of the result, as a NumPy or torch dtype or its name: float16, bfloat16
            (torch only), float32 or float64.
        shape: For packed codes, their shape before packing.
        out: Array or tensor of the shape and dtype of the result to write to. If an error is
            raised for a code, it may have been written to.

    Returns:
        Values of the dtype, of the kind, shape and device of `codes`; a float for an int.

    Raises:
        TypeError: If `codes` are not integers, `dtype` is not one of these, or `out` is of another
            kind or dtype.
        ValueError: If a code is out of range (not checked under torch.compile), the number of
            packed bytes does not match `shape`, the dtype cannot hold every value, or `out` is
            of another shape or device.

    Example:
        >>> from fpformats import E2M1
        >>> import numpy as np
        >>> decode(np.array([[0, 1], [7, 15]]), E2M1)
        array([[ 0. ,  0.5],
               [ 6. , -6. ]], dtype=float32)
        >>> decode(np.array([33, 7], dtype=np.uint8), E2M1, shape=3)
        array([0.5, 1. , 6. ], dtype=float32)
    """
    result, fmt = result_dtype(dtype, codes), as_format(fmt)
    grid = grid_of(fmt, result)
    wanted = None if shape is None else checked_packed(codes, fmt.bits, shape)
    check_target(out, codes, result.name, wanted)
    return dispatch.decode(codes, fmt, grid, result, wanted, out=out)


def values(fmt: FormatLike) -> NDArray[np.float64]:
    """List the distinct finite values of a format in ascending order.

    Args:
        fmt: A format of at most 24 bits, or its name.

    Returns:
        One-dimensional float64 array; zero is listed once, as +0.0.

    Raises:
        ValueError: If the format has more than 24 bits, or float64 cannot hold all its values
            (`fpformats.exact.values` lists those as fractions).

    Example:
        >>> from fpformats import E3M0U
        >>> values(E3M0U).tolist()
        [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    """
    fmt = as_format(fmt)
    if fmt.bits > 24:
        raise ValueError(f"{fmt} has 2**{fmt.bits} codes; values are listed up to 24 bits")
    magnitudes = decode(np.arange(fmt.max_code + 1), fmt, dtype="float64")
    negative = -magnitudes[fmt.smallest_code :][::-1] if fmt.signed else magnitudes[:0]
    listed: NDArray[np.float64] = np.concatenate([negative, magnitudes])
    return listed


def checked_nan_code(nan: int | None, fmt: FloatFormat) -> int | None:
    """Give the code for NaN: the given one, or else the format's own if it has one.

    Raises:
        ValueError: If the given one is not a code of the format.
    """
    if nan is not None and (type(nan) is not int or not 0 <= nan < fmt.code_count):
        raise ValueError(f"nan is {nan}; codes of {fmt} are 0 to {fmt.code_count - 1}")
    return fmt.nan_code if nan is None else nan


def check_packable(x: Any, fmt: FloatFormat, packed: bool) -> None:
    """Check that codes for `x` can be packed, if `packed` is True.

    Raises:
        TypeError: If `x` is a number.
        ValueError: If codes are too wide.
    """
    if packed and not hasattr(x, "shape"):
        raise TypeError(f"x is a {type(x).__name__}; only codes of an array or a tensor are packed")
    if packed and not 1 <= fmt.bits <= MAX_BITS:
        raise ValueError(f"packed is True; {fmt} has {fmt.bits} bits, and 1 to {MAX_BITS} pack")


def check_codes_target(out: Any, x: Any, fmt: FloatFormat, packed: bool) -> None:
    """Check that `out` can take the codes of `x`.

    Raises:
        TypeError: If it is of another kind or dtype than the codes.
        ValueError: If its shape or device differ.
    """
    shape = tuple(getattr(x, "shape", ()))
    if packed:
        shape = (-(-math.prod(shape) * fmt.bits // 8),)
    check_target(out, x, "uint8" if packed else code_dtype(fmt.bits), shape)
