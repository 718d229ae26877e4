"""Between values of a carrier type, values of a format, and codes.

All functions take NumPy arrays, torch tensors (on any device, of any shape and strides) and
single Python numbers, and return the same kind. Every result is rounded once, exactly as the
definition in `fpformats.exact` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fpformats.kernels import philox, policy, portable
from fpformats.operands import (
    carrier_named,
    carrier_of,
    cast,
    check_codes,
    check_out,
    check_words,
    grid_of,
    is_batched,
    is_hidden,
    is_tensor,
    library_of,
    narrowed,
    needs_gradient,
    quiet,
    shaped,
    widened,
    working_carrier,
)
from fpformats.rounding import FINITE, NEAREST, check_policy, is_stochastic

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

    from fpformats.formats import FloatFormat
    from fpformats.kernels.grid import Grid


def quantize(
    x: Any,
    fmt: FloatFormat,
    *,
    rounding: str = NEAREST,
    saturation: str = FINITE,
    random: Any = None,
    random_bits: int = 32,
    clip_gradient: bool = False,
    out: Any = None,
) -> Any:
    """Round to the values of a format, in the same carrier type.

    Rounding and saturation are IEEE P3109's (4.6): the value as given is rounded once, and what
    then is beyond the range is saturated. By default it goes to the nearest value, ties to the
    even code, and everything beyond the range, infinities too, becomes the nearest finite value.
    So negative numbers become 0 in an unsigned format. NaN stays NaN, and -0.0 stays -0.0 where
    the format has it.

    Args:
        x: Array, tensor or number of float16, bfloat16, float32 or float64, of any shape.
        fmt: The format.
        rounding: Name or member of `Rounding`.
        saturation: Name or member of `Saturation`.
        random: For the stochastic modes, a seed from 0 to 2**64 - 1, from which each element
            takes the word of its place in row-major order, whatever the device; or the words
            themselves, an array of integers of the library and shape of `x`.
        random_bits: Width of the random words, 1 to 32.
        clip_gradient: The gradient passes straight through to a tensor `x` that requires one;
            if True, only where `x` is in the range of the format.
        out: Array or tensor of the kind, shape and dtype of `x` to write to; may be `x`.

    Returns:
        Rounded values of the kind, shape, dtype and device of `x`, or `out`.

    Raises:
        TypeError: If `x` is not floating point, or `out` is of another kind or dtype.
        ValueError: If the dtype of `x` cannot hold every value of the format, a policy is
            unknown, or `out` has another shape or device, or would cut off a gradient.

    Example:
        >>> from fpformats import E2M1, E2M1U
        >>> import numpy as np
        >>> quantize(np.array([0.3, 1.25, -2.6, 100.0]), E2M1)
        array([ 0.5,  1. , -3. ,  6. ])
        >>> quantize(np.array([0.3, 1.25, -2.6, 100.0]), E2M1U)
        array([0.5, 1. , 0. , 6. ])
    """
    check_policy(rounding, saturation, random, random_bits)
    carrier = carrier_of(x)
    grid = grid_of(fmt, carrier)
    check_out(out, x)
    check_words(random, random_bits, x)
    xp, wide = library_of(x), widened(x, working_carrier(carrier))
    with quiet():
        y = rounded(xp, wide, grid, rounding, saturation, random, random_bits)
    if needs_gradient(x, out=out):
        from fpformats.gradients import straight_through

        inside = (x >= grid.low) & (x <= grid.high) if clip_gradient else None
        return straight_through(narrowed(y, x), x, inside)
    return narrowed(y, x, out)


def encode(
    x: Any,
    fmt: FloatFormat,
    *,
    rounding: str = NEAREST,
    saturation: str = FINITE,
    random: Any = None,
    random_bits: int = 32,
    nan: int | None = None,
) -> Any:
    """Round to the codes of a format.

    Args:
        x: Array, tensor or number of float16, bfloat16, float32 or float64, of any shape.
        fmt: The format.
        rounding: As in `quantize`.
        saturation: As in `quantize`.
        random: As in `quantize`.
        random_bits: As in `quantize`.
        nan: Code to give for NaN. By default the format's own NaN (`FloatFormat.nan_code`).

    Returns:
        Codes in the smallest unsigned integer dtype that has `fmt.bits` bits, of the kind, shape
        and device of `x`; an int for a number.

    Raises:
        TypeError: If `x` is not floating point.
        ValueError: If `x` contains NaN, the format has none and `nan` is None (where
            torch.compile hides whether it does, `nan` is required instead); if the dtype of `x`
            cannot hold every value of the format, or an option is out of range.

    Example:
        >>> from fpformats import E2M1, E4M3
        >>> encode(-1.27, E2M1)
        11
        >>> encode(float("nan"), E4M3), encode(float("nan"), E2M1, nan=0)
        (127, 0)
    """
    check_policy(rounding, saturation, random, random_bits)
    carrier = carrier_of(x)
    grid = grid_of(fmt, carrier)
    if nan is not None and not 0 <= nan < fmt.code_count:
        raise ValueError(f"nan is {nan}; codes of {fmt} are 0 to {fmt.code_count - 1}")
    check_words(random, random_bits, x)
    xp, wide = library_of(x), widened(x, working_carrier(carrier))
    nan_code = fmt.nan_code if nan is None else nan
    with quiet():
        values = rounded(xp, wide, grid, rounding, saturation, random, random_bits)
        if nan_code is None:
            _refuse_nan(xp, wide, values, fmt, saturation)
        codes = portable.encode(xp, values, grid, nan_code)
    width = max(8, 1 << (fmt.bits - 1).bit_length())
    return shaped(cast(codes, f"uint{width}"), x)


def decode(codes: Any, fmt: FloatFormat, dtype: Any = "float32") -> Any:
    """Give the values of codes.

    Args:
        codes: Array or tensor of any integer dtype and any shape, or an int.
        fmt: The format.
        dtype: Carrier of the result, as a NumPy or torch dtype or its name: float16, bfloat16
            (torch only), float32 or float64.

    Returns:
        Values of the dtype, of the kind, shape and device of `codes`; a float for an int.

    Raises:
        TypeError: If `codes` are not integers, or `dtype` is not a carrier.
        ValueError: If a code is out of range (not looked at under torch.compile), or the dtype
            cannot hold every value of the format.

    Example:
        >>> from fpformats import E2M1
        >>> import numpy as np
        >>> decode(np.array([[0, 1], [7, 15]]), E2M1)
        array([[ 0. ,  0.5],
               [ 6. , -6. ]], dtype=float32)
    """
    carrier = carrier_named(dtype)
    grid = grid_of(fmt, carrier)
    check_codes(codes, fmt.bits, str(fmt))
    xp, working = library_of(codes), working_carrier(carrier)
    integer = working.name.replace("float", "int")
    with quiet():
        values = portable.decode(xp, _as_integers(codes, integer), grid)
    return shaped(cast(values, carrier.name), codes)


def values(fmt: FloatFormat) -> NDArray[np.float64]:
    """List the distinct finite values of a format in ascending order.

    Args:
        fmt: A format of at most 24 bits.

    Returns:
        One-dimensional float64 array; zero is in it once, as +0.0.

    Raises:
        ValueError: If the format has more codes than can sensibly be listed, or float64 cannot
            hold them all (`fpformats.exact.values` lists those as fractions).

    Example:
        >>> from fpformats import E3M0U
        >>> values(E3M0U).tolist()
        [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    """
    if fmt.bits > 24:
        raise ValueError(f"{fmt} has 2**{fmt.bits} codes; values are listed up to 24 bits")
    magnitudes = decode(np.arange(fmt.max_code + 1), fmt, "float64")
    negative = -magnitudes[fmt.smallest_code :][::-1] if fmt.signed else magnitudes[:0]
    listed: NDArray[np.float64] = np.concatenate([negative, magnitudes])
    return listed


def rounded(
    xp: ModuleType,
    x: Any,
    grid: Grid,
    rounding: str = NEAREST,
    saturation: str = FINITE,
    random: Any = None,
    bits: int = 32,
) -> Any:
    """Round in the mode that is asked for; the default one has a faster way of its own.

    Args:
        xp: The library of `x`, numpy or torch.
        x: Array of the grid's carrier.
        grid: The format.
        rounding: As in `quantize`.
        saturation: As in `quantize`.
        random: As in `quantize`, checked.
        bits: As `random_bits` in `quantize`.

    Returns:
        A new array of the shape and dtype of `x`.
    """
    # The faster way works in place, which vmap cannot.
    if rounding == NEAREST and saturation == FINITE and not is_batched(x):
        return portable.quantize(xp, x, grid)
    words = None
    if isinstance(random, int):
        words = philox.random_words(xp, x, random, bits)
    elif is_stochastic(rounding):
        words = cast(random, "int64").reshape(x.shape)
    edges = policy.make_edges(grid, rounding, saturation)
    return policy.quantize(xp, x, grid, rounding, edges, words, bits)


def _refuse_nan(xp: ModuleType, x: Any, values: Any, fmt: FloatFormat, saturation: str) -> None:
    if is_hidden(values):
        raise ValueError(
            f"nan is None, and {fmt} has no NaN: torch.compile and vmap need nan= as a code"
        )
    if not bool(xp.isnan(values).any()):
        return
    if bool(xp.isnan(x).any()):
        raise ValueError(f"x contains NaN, which {fmt} has no code for; nan= gives it one")
    raise ValueError(
        f"x goes beyond {fmt}, which {saturation} makes NaN, and {fmt} has no code for NaN; "
        "nan= gives it one"
    )


def _as_integers(codes: Any, dtype: str) -> Any:
    if is_tensor(codes):
        return cast(codes, dtype)
    # Through the unsigned type, so that an int beyond the signed one wraps as arrays do.
    unsigned = np.asarray(codes, dtype=f"u{dtype}") if isinstance(codes, int) else codes
    return np.atleast_1d(unsigned).astype(dtype)
