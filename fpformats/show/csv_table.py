"""Tables of all codes as CSV, in the columns of the value tables of IEEE P3109."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fpformats import exact

if TYPE_CHECKING:
    from collections.abc import Iterator
    from fractions import Fraction

    from fpformats.formats import FloatFormat

MAX_BITS = 24


def csv(fmt: FloatFormat) -> str:
    """Write every code with its exact value, for formats of any range.

    Args:
        fmt: A format of at most 24 bits.

    Returns:
        Lines of code point, value, and an asterisk if the value is subnormal. Values are
        hexadecimal floating-point constants as in C, or NaN, Inf and -Inf.

    Raises:
        ValueError: If the format has more than 24 bits.

    Example:
        >>> from fpformats import E2M0U
        >>> print(csv(E2M0U), end="")
        codepoint,value,subnormal
        0x0,0x0p+0,
        0x1,0x1p+0,
        0x2,0x1p+1,
        0x3,0x1p+2,
    """
    if fmt.bits > MAX_BITS:
        raise ValueError(f"{fmt} has {fmt.bits} bits; at most {MAX_BITS} can be listed")
    return "codepoint,value,subnormal\n" + "".join(_rows(fmt))


def hexadecimal(value: Fraction | float) -> str:
    """Write a value as a hexadecimal floating-point constant, exactly, however large or small.

    Args:
        value: A fraction whose denominator is a power of two, or a float as `exact` gives it.

    Returns:
        The constant, with one digit before the point.

    Example:
        >>> from fractions import Fraction
        >>> hexadecimal(Fraction(-13, 4)), hexadecimal(float("inf"))
        ('-0x1.ap+1', 'Inf')
    """
    if value != value:
        return "NaN"
    if value == 0:
        return "-0x0p+0" if isinstance(value, float) else "0x0p+0"
    sign = "-" if value < 0 else ""
    if isinstance(value, float):
        return f"{sign}Inf"
    twos = abs(value.numerator).bit_length() - 1
    exponent = twos - value.denominator.bit_length() + 1
    fraction = abs(value.numerator) - (1 << twos)
    # Hexadecimal digits after the point; the bits are shifted left to fill the last digit.
    width = -(-twos // 4)
    digits = f"{fraction << (4 * width - twos):0{width}x}".rstrip("0") if width else ""
    return f"{sign}0x1{'.' if digits else ''}{digits}p{exponent:+d}"


def _rows(fmt: FloatFormat) -> Iterator[str]:
    width = -(-fmt.bits // 4)
    first_normal = 1 << fmt.mantissa_bits if fmt.subnormals else 0
    for code in range(fmt.code_count):
        value = exact.decode(code, fmt)
        magnitude = code & ((1 << fmt.magnitude_bits) - 1)
        is_subnormal = 0 < magnitude < first_normal and exact.is_finite(value)
        yield f"0x{code:0{width}x},{hexadecimal(value)},{'*' if is_subnormal else ''}\n"
