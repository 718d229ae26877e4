"""The parameters of a kernel: one format in terms of one dtype, as plain numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fpformats.formats import FloatFormat


class FloatDtype(NamedTuple):
    """A floating-point type that holds values: its mantissa bits and exponent bias."""

    name: str
    mantissa_bits: int
    bias: int

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias


FLOAT_DTYPES = {
    dtype.name: dtype
    for dtype in (
        FloatDtype("float16", 10, 15),
        FloatDtype("bfloat16", 7, 127),
        FloatDtype("float32", 23, 127),
        FloatDtype("float64", 52, 1023),
    )
}


class Grid(NamedTuple):
    """The kernel parameters of a format, in terms of one dtype.

    Attributes:
        floating: Name of the dtype.
        integer: Name of the integer dtype of the same width.
        width: Mantissa bits of the dtype.
        exponent_mask: Pattern of the dtype's exponent field.
        low: Lowest finite value.
        high: Largest finite value.
        floor: Power of two below which the spacing stays constant.
        ceiling: Power of two above which the spacing need not grow: only NaN is beyond it.
        first_field: For binades of one step, the exponent field in the dtype of the binade of
            code 1, whether the format has that code or not.
        spacing: Distance between neighbours within a binade, divided by its power of two.
        magic: Factor of the powers of two from `floor` to `ceiling`. The product is a number
            whose last bit is the spacing; 0 if the dtype has no such numbers.
        ties_by_parity: Whether a binade is one step wide, so that the exponent gives the parity.
        smallest: Smallest value above zero if it is not one step from zero, else 0.
        zero: Whether there is a zero.
        signed: Whether there are negative values.
        negative_zero: Whether zero has a sign.
        magnitude_bits: Width of a code below the sign.
        shift: Mantissa bits that the dtype has beyond the format; -1 if every code is linear.
        offset: Bit pattern in the dtype, shifted right by `shift`, minus the code, for codes that
            are not linear.
        linear: Codes below this one are linear: code n stands for n times `quantum`.
        linear_high: Limit to which magnitudes can be clipped without changing a linear one.
        quantum: Smallest spacing.
        infinity_code: Magnitude of infinity's code; -1 without infinity.
        first_nan: Smallest magnitude of a code that is NaN; -1 if there is none.
        nan_is_negative_zero: Whether NaN has the code of negative zero.
        lift: Power of two that makes the dtype's subnormal numbers normal, or 0.
        lifted_codes: Codes below this one stand for subnormal numbers of the dtype, or 0.
        max_is_odd: Whether the largest finite value has an odd code.
        lifted: Grid of the values times `lift`, for formats with values that are subnormal in
            the dtype (without being subnormal, or one step from zero, in the format).
    """

    floating: str
    integer: str
    width: int
    exponent_mask: int
    low: float
    high: float
    floor: float
    ceiling: float
    first_field: int
    spacing: float
    magic: float
    ties_by_parity: bool
    smallest: float
    zero: bool
    signed: bool
    negative_zero: bool
    magnitude_bits: int
    shift: int
    offset: int
    linear: int
    linear_high: float
    quantum: float
    infinity_code: int
    first_nan: int
    nan_is_negative_zero: bool
    lift: float
    lifted_codes: int
    max_is_odd: bool
    lifted: Grid | None


def holds(dtype: FloatDtype, fmt: FloatFormat) -> bool:
    """Tell whether every finite value of a format is exact in a dtype.

    Args:
        dtype: The dtype.
        fmt: The format.

    Returns:
        Whether the precision, the range and the smallest step all fit the dtype.

    Example:
        >>> from fpformats.formats import FloatFormat
        >>> holds(FLOAT_DTYPES["float16"], FloatFormat(8, 3))
        False
    """
    significand, _ = fmt.scaled_magnitude(fmt.max_code)
    _, smallest_step = fmt.scaled_magnitude(fmt.smallest_code)
    return (
        significand.bit_length() <= dtype.mantissa_bits + 1
        and fmt.max_exponent <= dtype.bias
        and smallest_step >= dtype.min_exponent - dtype.mantissa_bits
    )


def make_grid(fmt: FloatFormat, dtype: FloatDtype, lift: int = 0) -> Grid:
    """Work out the kernel parameters of a format in a dtype that holds it.

    Args:
        fmt: The format.
        dtype: The dtype, float32 or float64.
        lift: Exponent of a power of two. All values are multiplied by that power, and clipped
            to it.

    Returns:
        The parameters. All floats among them are exact in the dtype.
    """
    width, mantissa_bits = dtype.mantissa_bits, fmt.mantissa_bits
    step = fmt.scaled_magnitude(fmt.smallest_code)[1] + lift
    top, bottom = fmt.max_exponent + lift, fmt.min_exponent + lift
    if lift and top > lift:
        top, high = lift, math.ldexp(1.0, lift)
    else:
        high = _scaled(fmt, fmt.max_code, lift)
    # If all values are subnormal, the grid is the same as that of their last binade.
    bottom = min(bottom, top)
    digits = bottom - step
    first = bottom + 1 - fmt.smallest_code
    needs_lift = bottom < dtype.min_exponent
    has_magic = digits <= width - 2 and top + width - digits <= dtype.bias
    linear = 1 << mantissa_bits if fmt.subnormals else fmt.smallest_code
    smallest = 0.0 if fmt.subnormals else _scaled(fmt, fmt.smallest_code, lift)
    nan_is_negative_zero = fmt.nan_code == 1 << fmt.magnitude_bits
    return Grid(
        floating=dtype.name,
        integer=dtype.name.replace("float", "int"),
        width=width,
        exponent_mask=(2 * dtype.bias + 1) << width,
        low=-high if fmt.signed else 0.0 if fmt.zero else smallest,
        high=high,
        floor=math.ldexp(1.0, max(bottom, dtype.min_exponent)),
        ceiling=math.ldexp(1.0, _ceiling_exponent(top, first, digits, dtype)),
        first_field=first + dtype.bias,
        spacing=math.ldexp(1.0, -digits),
        magic=math.ldexp(1.5, width - digits) if has_magic else 0.0,
        ties_by_parity=digits == 0,
        smallest=smallest,
        zero=fmt.zero,
        signed=fmt.signed,
        negative_zero=fmt.has_negative_zero,
        magnitude_bits=fmt.magnitude_bits,
        shift=-1 if fmt.max_code < linear else width - mantissa_bits,
        offset=(dtype.bias - fmt.bias + lift) << mantissa_bits,
        linear=linear,
        linear_high=high if fmt.max_code < linear else math.ldexp(linear, step),
        quantum=math.ldexp(1.0, step),
        infinity_code=-1 if fmt.infinity_code is None else fmt.infinity_code,
        first_nan=_first_nan(fmt) if fmt.has_nan and not nan_is_negative_zero else -1,
        nan_is_negative_zero=nan_is_negative_zero,
        lift=math.ldexp(1.0, width) if needs_lift else 0.0,
        lifted_codes=(1 - dtype.bias + fmt.bias) << mantissa_bits if needs_lift else 0,
        max_is_odd=fmt.max_code % 2 == 1,
        lifted=make_grid(fmt, dtype, width) if needs_lift else None,
    )


def _ceiling_exponent(top: int, first: int, digits: int, dtype: FloatDtype) -> int:
    """Give the top exponent; without mantissa bits, one near it whose code is odd.

    NaN is rounded as if it were in that binade, and portable._break_ties does not change numbers
    in binades with an odd code.
    """
    ceiling = max(top, dtype.min_exponent)
    if digits > 0 or (ceiling - first) % 2 == 0:
        return ceiling
    return ceiling + 1 if ceiling < dtype.bias else ceiling - 1


def _scaled(fmt: FloatFormat, code: int, lift: int) -> float:
    significand, exponent = fmt.scaled_magnitude(code)
    return math.ldexp(significand, exponent + lift)


def _first_nan(fmt: FloatFormat) -> int:
    return fmt.max_code + 1 + fmt.has_infinity
