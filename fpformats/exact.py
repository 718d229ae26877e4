"""The definition of decoding, rounding and encoding, in rational arithmetic.

This module works on one value at a time and is slow. Read it beside the standards: OCP OFP8 1.0,
section 5, and LLVM's float types for the codes; IEEE P3109 4.0, sections 4.6.2 and 4.6.3, for
rounding and saturation. It uses only the fields of a format and has no limit on width. It shares
no code with the kernels, which are tested against it.

    >>> from fpformats import E4M3
    >>> quantize(Fraction(17, 16) + Fraction(1, 10**100), E4M3)
    Fraction(9, 8)
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from numbers import Rational
from typing import TYPE_CHECKING

from fpformats.formats import Specials

if TYPE_CHECKING:
    from fpformats.formats import FloatFormat

NAN = math.nan
INFINITY = math.inf
NEGATIVE_ZERO = -0.0
"""Values that fractions cannot express; they are floats."""
ROUNDINGS = (
    "TowardZero", "TowardPositive", "TowardNegative", "NearestTiesToAway", "NearestTiesToEven",
    "ToOdd", "StochasticA", "StochasticB", "StochasticC",
)  # fmt: skip
SATURATIONS = ("SatFinite", "SatPropagate", "SatNone", "OverflowNaN")


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
    if (sign, magnitude) == (1, 0) and fmt.specials in (Specials.FNUZ, Specials.EXTENDED):
        return NAN
    value = _decode_magnitude(magnitude, fmt)
    if sign:
        return NEGATIVE_ZERO if value == 0 else -value
    return value


def values(fmt: FloatFormat) -> list[Fraction]:
    """List the distinct finite values of a format in ascending order, however wide its range.

    Args:
        fmt: A format of at most 24 bits.

    Returns:
        The values. Zero, if the format has it, is listed once.

    Raises:
        ValueError: If the format has more than 24 bits.

    Example:
        >>> from fpformats import p3109
        >>> values(p3109(12, 1, signed=False))[-1] == Fraction(2) ** 2045
        True
    """
    bits = fmt.exponent_bits + fmt.mantissa_bits + fmt.signed
    if bits > 24:
        raise ValueError(f"{fmt} has 2**{bits} codes; values are listed up to 24 bits")
    decoded = (decode(code, fmt) for code in range(1 << bits))
    return sorted({Fraction(value) for value in decoded if is_finite(value)})


def quantize(
    x: Fraction | float,
    fmt: FloatFormat,
    rounding: str = "NearestTiesToEven",
    saturation: str = "SatFinite",
    word: int = 0,
    random_bits: int = 32,
) -> Fraction | float:
    """Round to a value of the format, then saturate.

    Args:
        x: Any rational number, or a float, which may be NaN, infinite or -0.0.
        fmt: The format.
        rounding: Name of a rounding mode.
        saturation: Name of a saturation mode.
        word: The random word of the stochastic modes, 0 to 2**random_bits - 1.
        random_bits: Number of bits of `word`.

    Returns:
        A value of the format as a fraction, or one of the floats NaN, infinity, -infinity and
        -0.0. Saturation may give NaN even if the format has no NaN.

    Raises:
        ValueError: If a mode is unknown, or `word` or `random_bits` is out of range.

    Example:
        >>> from fpformats import E2M1, E4M0U
        >>> quantize(Fraction(5, 4), E2M1), quantize(-3, E4M0U), quantize(math.inf, E2M1)
        (Fraction(1, 1), Fraction(0, 1), Fraction(6, 1))
        >>> quantize(-0.1, E2M1), quantize(-0.1, E2M1, "TowardNegative")
        (-0.0, Fraction(-1, 2))
        >>> quantize(0.375, E2M1, "StochasticA", word=63, random_bits=8)
        Fraction(0, 1)
        >>> quantize(0.375, E2M1, "StochasticA", word=64, random_bits=8)
        Fraction(1, 2)
    """
    _check_modes(rounding, saturation, word, random_bits)
    x = x if isinstance(x, Rational) else float(x)  # converts NumPy numbers too
    if x != x:
        return NAN
    if not is_finite(x):
        return _saturate_infinity(x > 0, fmt, saturation)
    negative = math.copysign(1, x) < 0 if isinstance(x, float) else x < 0
    magnitude = _round_to_precision(abs(Fraction(x)), negative, fmt, rounding, word, random_bits)
    result = _saturate(-magnitude if negative else magnitude, negative, fmt, rounding, saturation)
    if result == 0 and negative and fmt.signed and not _nan_replaces_negative_zero(fmt):
        return NEGATIVE_ZERO
    return result


def encode(
    x: Fraction | float,
    fmt: FloatFormat,
    rounding: str = "NearestTiesToEven",
    saturation: str = "SatFinite",
    word: int = 0,
    random_bits: int = 32,
) -> int:
    """Round as `quantize` does, and return the code.

    Args:
        x: Any rational number, or a float.
        fmt: The format.
        rounding: As in `quantize`.
        saturation: As in `quantize`.
        word: As in `quantize`.
        random_bits: As in `quantize`.

    Returns:
        The code, from 0 to 2**bits - 1.

    Raises:
        ValueError: If the result is NaN and the format has none.

    Example:
        >>> from fpformats import E2M1
        >>> encode(Fraction(-5, 4), E2M1)
        10
    """
    value = quantize(x, fmt, rounding, saturation, word, random_bits)
    if value != value:
        return _nan_code(fmt)
    negative = math.copysign(1, value) < 0 if isinstance(value, float) else value < 0
    sign = int(negative) << (fmt.exponent_bits + fmt.mantissa_bits)
    if not is_finite(value):
        return sign + _infinity_code(fmt)
    return sign + _code_of(abs(Fraction(value)), fmt)


def is_finite(value: Fraction | float) -> bool:
    """Tell whether a value is finite, even if it is a fraction too large for `math.isfinite`."""
    return not isinstance(value, float) or math.isfinite(value)


@functools.lru_cache(maxsize=2**16)
def _decode_magnitude(code: int, fmt: FloatFormat) -> Fraction | float:
    field, fraction = divmod(code, 1 << fmt.mantissa_bits)
    if code > _last_finite_code(fmt):
        return INFINITY if _has_infinity(fmt) and code == _infinity_code(fmt) else NAN
    significand = Fraction(fraction, 1 << fmt.mantissa_bits)
    if field == 0 and fmt.subnormals:
        return significand * Fraction(2) ** (1 - fmt.bias)
    if code == 0 and fmt.zero:
        return Fraction(0)
    return (1 + significand) * Fraction(2) ** (field - fmt.bias)


def _round_to_precision(
    x: Fraction, negative: bool, fmt: FloatFormat, rounding: str, word: int, random_bits: int
) -> Fraction:
    """Round a magnitude to the precision of the format, without regard to its range."""
    smallest = _decode_magnitude(1 if fmt.zero else 0, fmt)
    if not fmt.subnormals and x < smallest:
        # No value lies between zero and the smallest value. A missing zero counts as odd.
        below, step, even = Fraction(0), Fraction(smallest), fmt.zero
    else:
        lowest = 1 - fmt.bias if fmt.subnormals else -fmt.bias
        exponent = max(_floor_log2(x), lowest) if x else lowest
        step = Fraction(2) ** (exponent - fmt.mantissa_bits)
        count = x // step
        below = count * step
        # With one significant bit, the code of a power of two is its exponent plus the bias.
        even = count % 2 == 0 if fmt.mantissa_bits else count == 0 or (exponent + fmt.bias) % 2 == 0
    v = (x - below) / step
    away = _rounds_away(v, negative, even, rounding, word, 1 << random_bits)
    return below + step if away else below


def _check_modes(rounding: str, saturation: str, word: int, random_bits: int) -> None:
    for argument, mode, modes in (
        ("rounding", rounding, ROUNDINGS),
        ("saturation", saturation, SATURATIONS),
    ):
        if mode not in modes:
            raise ValueError(f"{argument} is {mode!r}; allowed: {', '.join(modes)}")
    if not 1 <= random_bits <= 32:
        raise ValueError(f"random_bits is {random_bits}; allowed: 1 to 32")
    if not 0 <= word < 1 << random_bits:
        raise ValueError(f"word is {word}; words of {random_bits} bits are allowed")


def _rounds_away(
    v: Fraction, negative: bool, even: bool, rounding: str, word: int, words: int
) -> bool:
    """Tell whether a number rounds away from zero.

    The number lies v steps beyond its neighbour nearer zero.
    """
    match rounding:
        case "TowardZero":
            return False
        case "TowardPositive":
            return v > 0 and not negative
        case "TowardNegative":
            return v > 0 and negative
        case "NearestTiesToAway":
            return v >= Fraction(1, 2)
        case "NearestTiesToEven":
            return v > Fraction(1, 2) or (v == Fraction(1, 2) and not even)
        case "ToOdd":
            return v > 0 and even
        case "StochasticA":
            return math.floor(v * words) + word >= words
        case "StochasticB":
            return math.floor(v * 2 * words) + 2 * word + 1 >= 2 * words
    return round(v * words) + word >= words  # StochasticC; Python rounds ties to even


def _saturate(
    x: Fraction, negative: bool, fmt: FloatFormat, rounding: str, saturation: str
) -> Fraction | float:
    high = Fraction(_decode_magnitude(_last_finite_code(fmt), fmt))
    smallest = Fraction(_decode_magnitude(1 if fmt.zero else 0, fmt))
    low = -high if fmt.signed else Fraction(0) if fmt.zero else smallest
    if x == 0 and not fmt.zero:
        if saturation in ("SatNone", "OverflowNaN"):
            return NAN
        return -smallest if negative and fmt.signed else smallest
    if low <= x <= high:
        return x
    if saturation in ("SatFinite", "SatPropagate"):
        return high if x > high else low
    # Between the largest value and infinity, rounding to odd chooses the odd code.
    max_is_odd = rounding == "ToOdd" and _has_infinity(fmt) and _last_finite_code(fmt) % 2 == 1
    if x > high:
        if rounding in ("TowardZero", "TowardNegative") or max_is_odd:
            return high
        return _saturate_infinity(True, fmt, saturation)
    if rounding in ("TowardZero", "TowardPositive") or (max_is_odd and fmt.signed):
        return low
    return _saturate_infinity(False, fmt, saturation)


def _saturate_infinity(positive: bool, fmt: FloatFormat, saturation: str) -> Fraction | float:
    high = Fraction(_decode_magnitude(_last_finite_code(fmt), fmt))
    if saturation != "SatFinite" and _has_infinity(fmt) and (positive or fmt.signed):
        return INFINITY if positive else -INFINITY
    if saturation == "OverflowNaN":
        return NAN
    if positive:
        return high
    if fmt.signed:
        return -high
    if saturation == "SatNone":
        return NAN
    return Fraction(0) if fmt.zero else Fraction(_decode_magnitude(0, fmt))


def _code_of(value: Fraction, fmt: FloatFormat) -> int:
    """Find the code of a value >= 0 of the format by bisection, as values grow with codes."""
    low, high = 0, _last_finite_code(fmt)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _decode_magnitude(middle, fmt) <= value else (low, middle - 1)
    return low


def _floor_log2(x: Fraction) -> int:
    """Give the exponent e with 2**e <= x < 2**(e+1), exactly."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def _last_finite_code(fmt: FloatFormat) -> int:
    codes = 1 << (fmt.exponent_bits + fmt.mantissa_bits)
    match fmt.specials:
        case Specials.IEEE:
            return codes - (1 << fmt.mantissa_bits) - 1
        case Specials.NAN_ONLY:
            return codes - 2
        case Specials.EXTENDED:
            return codes - 2 if fmt.signed else codes - 3
        case _:
            return codes - 1


def _has_infinity(fmt: FloatFormat) -> bool:
    return fmt.specials in (Specials.IEEE, Specials.EXTENDED)


def _infinity_code(fmt: FloatFormat) -> int:
    return _last_finite_code(fmt) + 1


def _nan_replaces_negative_zero(fmt: FloatFormat) -> bool:
    return fmt.signed and fmt.specials in (Specials.FNUZ, Specials.EXTENDED)


def _nan_code(fmt: FloatFormat) -> int:
    """Give the code for NaN; if there are several, the positive quiet NaN of IEEE 754."""
    codes = 1 << (fmt.exponent_bits + fmt.mantissa_bits)
    if _nan_replaces_negative_zero(fmt):
        return codes
    if fmt.specials in (Specials.NAN_ONLY, Specials.EXTENDED):
        return codes - 1
    if fmt.specials is Specials.IEEE and fmt.mantissa_bits > 0:
        return codes - (1 << (fmt.mantissa_bits - 1))
    raise ValueError(f"x is NaN, which {fmt} has no code for")
