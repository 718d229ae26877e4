"""The definition of decoding, rounding and encoding, in rational arithmetic.

One value at a time and slow, to be read beside the standard: OCP OFP8 1.0, section 5, for the
codes, IEEE P3109, sections 4.6.2 and 4.6.3, for rounding and saturation. It takes nothing but a
format's fields, and shares no code with the kernels, which are tested against it.

    >>> from fpformats import E4M3
    >>> quantize(Fraction(17, 16) + Fraction(1, 10**100), E4M3)
    Fraction(9, 8)
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from fpformats.formats import Specials

if TYPE_CHECKING:
    from fpformats.formats import FloatFormat

NAN = math.nan
INFINITY = math.inf
NEGATIVE_ZERO = -0.0
"""What fractions cannot express stays a float."""


def decode(code: int, fmt: FloatFormat) -> Fraction | float:
    """Give the value of a code.

    Args:
        code: The code, from 0 to 2**bits - 1.
        fmt: The format.

    Returns:
        A fraction, or one of the floats NaN, infinity, -infinity and -0.0.

    Raises:
        ValueError: If the code is out of range.

    Example:
        >>> from fpformats import E5M2
        >>> decode(0b0_10000_10, E5M2), decode(0b1_11111_00, E5M2)
        (Fraction(3, 1), -inf)
    """
    magnitude_bits = fmt.exponent_bits + fmt.mantissa_bits
    if not 0 <= code < 1 << (magnitude_bits + fmt.signed):
        raise ValueError(f"code is {code}; {fmt} has {magnitude_bits + fmt.signed} bits")
    sign, magnitude = divmod(code, 1 << magnitude_bits)
    if fmt.specials is Specials.FNUZ and (sign, magnitude) == (1, 0):
        return NAN
    value = _decode_magnitude(magnitude, fmt)
    if sign:
        return NEGATIVE_ZERO if value == 0 else -value
    return value


def quantize(x: Fraction | float, fmt: FloatFormat) -> Fraction | float:
    """Round to the nearest value, ties to the even code, and saturate to finite values.

    Args:
        x: Any rational number, or a float, which may be NaN, infinite or -0.0.
        fmt: The format.

    Returns:
        A value of the format as a fraction, or one of the floats NaN and -0.0.

    Example:
        >>> from fpformats import E2M1, E4M0U
        >>> quantize(Fraction(5, 4), E2M1), quantize(-3, E4M0U), quantize(math.inf, E2M1)
        (Fraction(1, 1), Fraction(0, 1), Fraction(6, 1))
        >>> quantize(-0.1, E2M1)
        -0.0
    """
    if x != x:
        return NAN
    negative = _is_negative(x)
    if negative and not fmt.signed:
        return Fraction(0)
    magnitude = _decode_magnitude(_round_magnitude(-x if negative else x, fmt), fmt)
    if negative and magnitude == 0 and fmt.specials is not Specials.FNUZ:
        return NEGATIVE_ZERO
    return -magnitude if negative else magnitude


def encode(x: Fraction | float, fmt: FloatFormat) -> int:
    """Round as `quantize` does, and give the code.

    Args:
        x: Any rational number, or a float.
        fmt: The format.

    Returns:
        The code, from 0 to 2**bits - 1.

    Raises:
        ValueError: If `x` is NaN and the format has none.

    Example:
        >>> from fpformats import E2M1
        >>> encode(Fraction(-5, 4), E2M1)
        10
    """
    if x != x:
        return _nan_code(fmt)
    negative = _is_negative(x)
    if negative and not fmt.signed:
        return 0
    code = _round_magnitude(-x if negative else x, fmt)
    if negative and (code > 0 or fmt.specials is not Specials.FNUZ):
        code += 1 << (fmt.exponent_bits + fmt.mantissa_bits)
    return code


def _decode_magnitude(code: int, fmt: FloatFormat) -> Fraction | float:
    field, fraction = divmod(code, 1 << fmt.mantissa_bits)
    all_ones = (1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1
    if fmt.specials is Specials.NAN_ONLY and code == all_ones:
        return NAN
    if fmt.specials is Specials.IEEE and field == (1 << fmt.exponent_bits) - 1:
        return INFINITY if fraction == 0 else NAN
    if code == 0:
        return Fraction(0)
    significand = Fraction(fraction, 1 << fmt.mantissa_bits)
    if field == 0 and fmt.subnormals:
        return significand * Fraction(2) ** (1 - fmt.bias)
    return (1 + significand) * Fraction(2) ** (field - fmt.bias)


def _round_magnitude(x: Fraction | float, fmt: FloatFormat) -> int:
    """Give the code of the finite value nearest to x >= 0, by bisection over all codes."""
    low, high = 0, _last_finite_code(fmt)
    if x >= _decode_magnitude(high, fmt):
        return high
    x = Fraction(x)
    # Values grow with codes: value(low) <= x < value(high) throughout.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _decode_magnitude(middle, fmt) <= x else (low, middle)
    from_below, from_above = x - _decode_magnitude(low, fmt), _decode_magnitude(high, fmt) - x
    if from_below == from_above:
        return low if low % 2 == 0 else high
    return low if from_below < from_above else high


def _last_finite_code(fmt: FloatFormat) -> int:
    codes = 1 << (fmt.exponent_bits + fmt.mantissa_bits)
    if fmt.specials is Specials.IEEE:
        return codes - (1 << fmt.mantissa_bits) - 1
    return codes - 2 if fmt.specials is Specials.NAN_ONLY else codes - 1


def _nan_code(fmt: FloatFormat) -> int:
    """Give the code for NaN: where a format has several, the positive one, quiet as in IEEE."""
    codes = 1 << (fmt.exponent_bits + fmt.mantissa_bits)
    if fmt.specials is Specials.NAN_ONLY:
        return codes - 1
    if fmt.specials is Specials.FNUZ:
        return codes
    if fmt.specials is Specials.IEEE and fmt.mantissa_bits > 0:
        return codes - (1 << (fmt.mantissa_bits - 1))
    raise ValueError(f"x is NaN, which {fmt} has no code for")


def _is_negative(x: Fraction | float) -> bool:
    return math.copysign(1, x) < 0 if isinstance(x, float) else x < 0
