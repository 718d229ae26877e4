"""What a minifloat format is: a handful of facts, and everything that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_EXPONENT_BITS = 16
MAX_MANTISSA_BITS = 52


class Specials(Enum):
    """Which codes of a format are not finite numbers."""

    FINITE_ONLY = "finite only"
    """None: every code is a finite number."""

    NAN_ONLY = "NaN at all-ones magnitude, no infinity"
    """NaN where every exponent and mantissa bit is set (OCP OFP8 E4M3)."""

    IEEE = "IEEE infinities and NaNs"
    """The top exponent field holds infinity (mantissa 0) and NaN (other mantissas)."""

    FNUZ = "NaN at negative zero, no infinity"
    """NaN takes the code of negative zero, so zero has no sign (signed finite formats of P3109)."""

    EXTENDED = "P3109 infinities and one NaN"
    """Infinity at the top magnitude, NaN at negative zero; if unsigned, NaN is above infinity."""


SUFFIXES = {
    "F": Specials.FINITE_ONLY,
    "FN": Specials.NAN_ONLY,
    "IEEE": Specials.IEEE,
    "FNUZ": Specials.FNUZ,
    "EXT": Specials.EXTENDED,
}
"""Special values of a format by the suffix of its name."""
_SUFFIX_OF = {specials: suffix for suffix, specials in SUFFIXES.items()}
_STANDARD = {(4, 3): Specials.NAN_ONLY, (5, 2): Specials.IEEE}
"""Specials of signed names without a suffix, by exponent and mantissa bits (OCP OFP8 1.0)."""


class _Hashed:
    """A slot for the hash, which is computed once because every call looks up a format."""

    __slots__ = ("_hash",)
    _hash: int


@dataclass(frozen=True, slots=True, repr=False)
class FloatFormat(_Hashed):
    """A binary floating-point format, of at most 16 exponent and 52 mantissa bits.

    A code is, from the top, a sign bit (signed formats only), the exponent field F and the
    mantissa field T. With M mantissa bits it stands for::

        T * 2**(1 - bias - M)              where F = 0 (zero and the subnormals)
        (2**M + T) * 2**(F - bias - M)     elsewhere

    as in OCP OFP8 1.0, section 5. Without subnormals, the second line holds for F = 0 too, except
    that code 0 is zero. Without zero, it holds for code 0 as well, as in the block scale of
    OCP MX 1.0. An unsigned format has no sign bit and no negative value. Magnitudes grow with
    their codes, so "ties to even" refers to the code.

    Instances are immutable, hashable, and equal when all their fields are.

    Attributes:
        exponent_bits: Width of the exponent field, 0 to 16. With 0 the format is fixed point.
        mantissa_bits: Width of the mantissa field, 0 to 52.
        signed: Whether codes have a sign bit.
        bias: Exponent bias, any integer. By default 2**(E-1) - 1, but 0 for E = 0, and 2**(E-1)
            under `Specials.FNUZ` and `Specials.EXTENDED`.
        specials: Which codes are NaN or infinity.
        subnormals: Whether exponent field 0 holds the subnormal numbers. A format with zero but
            without mantissa bits has none to leave out; there this becomes True.
        zero: Whether the format has a zero. Without zero, it has no subnormals either.

    Raises:
        ValueError: If an argument is out of range, or the format has no finite nonzero value.

    Example:
        >>> fmt = FloatFormat(2, 1, signed=False)
        >>> fmt
        FloatFormat(E2M1U: 3 bits, unsigned, bias 1, max 6, finite only)
        >>> fmt.values().tolist()
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """

    exponent_bits: int
    mantissa_bits: int
    signed: bool = True
    bias: int = None  # type: ignore[assignment]
    specials: Specials = Specials.FINITE_ONLY
    subnormals: bool = True
    zero: bool = True

    def __post_init__(self) -> None:
        _check_width("exponent_bits", self.exponent_bits, MAX_EXPONENT_BITS)
        _check_width("mantissa_bits", self.mantissa_bits, MAX_MANTISSA_BITS)
        if not isinstance(self.specials, Specials):
            raise ValueError(f"specials is {self.specials!r}; allowed: {list(Specials)}")
        for name in ("signed", "subnormals", "zero"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: True, False")
        bias: object = self.bias
        if bias is None:
            object.__setattr__(self, "bias", default_bias(self.exponent_bits, self.specials))
        elif not _is_int(bias):
            raise ValueError(f"bias is {bias!r}; it must be an integer")
        if self.specials is Specials.FNUZ and not self.signed:
            raise ValueError("specials is FNUZ; an unsigned format has no negative zero to use")
        if self.mantissa_bits == 0 and self.zero:
            object.__setattr__(self, "subnormals", True)
        if not self.zero:
            self._check_no_zero()
        if self.max_code < self.smallest_code:
            raise ValueError(
                f"exponent_bits {self.exponent_bits} and mantissa_bits {self.mantissa_bits} leave "
                f"no finite nonzero value with specials {self.specials.name}; add a bit"
            )

    def _check_no_zero(self) -> None:
        if self.subnormals:
            raise ValueError("zero is False; that needs subnormals=False")
        if self.nan_code == 1 << self.magnitude_bits:
            raise ValueError(f"zero is False; {self.specials.name} puts NaN at its negative")

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            known = tuple(getattr(self, name) for name in self.__match_args__)
            object.__setattr__(self, "_hash", hash(known))
            return hash(known)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        sign = "signed" if self.signed else "unsigned"
        missing = "" if self.subnormals else ", no subnormals" if self.zero else ", no zero"
        return (
            f"FloatFormat({self}: {self.bits} {'bit' if self.bits == 1 else 'bits'}, {sign}, "
            f"bias {self.bias}, max {readable(self.exact_max)}, {self.specials.value}{missing})"
        )

    @property
    def name(self) -> str:
        """Canonical name, which `fpformats.parse` turns back into this format."""
        return format_name(self)

    @property
    def magnitude_bits(self) -> int:
        """Number of bits of a code below the sign bit."""
        return self.exponent_bits + self.mantissa_bits

    @property
    def bits(self) -> int:
        """Number of bits of a code."""
        return self.magnitude_bits + self.signed

    @property
    def code_count(self) -> int:
        """Number of codes, special ones included."""
        return 1 << self.bits

    @property
    def max_code(self) -> int:
        """Code of the largest finite value."""
        if self.specials is Specials.IEEE:
            return (((1 << self.exponent_bits) - 1) << self.mantissa_bits) - 1
        specials_above = 0
        if self.specials is Specials.NAN_ONLY:
            specials_above = 1
        elif self.specials is Specials.EXTENDED:
            specials_above = 1 if self.signed else 2
        return (1 << self.magnitude_bits) - 1 - specials_above

    @property
    def smallest_code(self) -> int:
        """Code of the smallest value above zero."""
        return 1 if self.zero else 0

    @property
    def has_infinity(self) -> bool:
        """Whether a code stands for infinity."""
        return self.specials in (Specials.IEEE, Specials.EXTENDED)

    @property
    def has_nan(self) -> bool:
        """Whether a code stands for NaN."""
        return self.nan_code is not None

    @property
    def has_negative_zero(self) -> bool:
        """Whether zero has a sign."""
        return self.signed and self.zero and self.nan_code != 1 << self.magnitude_bits

    @property
    def infinity_code(self) -> int | None:
        """Code of positive infinity, None where there is none."""
        return self.max_code + 1 if self.has_infinity else None

    @property
    def nan_code(self) -> int | None:
        """Code for NaN; the positive quiet one if there are several, None without NaN."""
        if self.specials is Specials.NAN_ONLY:
            return self.max_code + 1
        if self.specials is Specials.FNUZ:
            return 1 << self.magnitude_bits
        if self.specials is Specials.EXTENDED:
            return (1 << self.magnitude_bits) - (0 if self.signed else 1)
        if self.specials is Specials.IEEE and self.mantissa_bits:
            return self.max_code + 1 + (1 << (self.mantissa_bits - 1))
        return None

    @property
    def min_exponent(self) -> int:
        """Exponent of the lowest binade with a full mantissa."""
        return 1 - self.bias if self.subnormals else -self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of `max`: the e in 2**e <= max < 2**(e+1)."""
        significand, exponent = self.scaled_magnitude(self.max_code)
        return significand.bit_length() - 1 + exponent

    def scaled_magnitude(self, code: int) -> tuple[int, int]:
        """Give integers (n, e) such that the code of a finite value >= 0 stands for n * 2**e."""
        field, fraction = divmod(code, 1 << self.mantissa_bits)
        if (code == 0 and self.zero) or (field == 0 and self.subnormals):
            return fraction, 1 - self.bias - self.mantissa_bits
        return fraction + (1 << self.mantissa_bits), field - self.bias - self.mantissa_bits

    @property
    def exact_max(self) -> Fraction:
        """Largest finite value, as a fraction: some formats exceed float64."""
        significand, exponent = self.scaled_magnitude(self.max_code)
        return significand * Fraction(2) ** exponent

    @property
    def exact_smallest(self) -> Fraction:
        """Smallest value above zero, as a fraction: some formats exceed float64."""
        significand, exponent = self.scaled_magnitude(self.smallest_code)
        return significand * Fraction(2) ** exponent

    @property
    def max(self) -> float:
        """Largest finite value; OverflowError where float64 cannot hold it (see `exact_max`)."""
        return _as_float(self.exact_max, "max", self)

    @property
    def min(self) -> float:
        """Lowest finite value: -max if signed, else 0 (or `smallest` in a format without zero).

        Raises:
            OverflowError: Where float64 cannot hold it.
        """
        if self.signed:
            return -self.max
        return 0.0 if self.zero else self.smallest

    @property
    def smallest(self) -> float:
        """Smallest value above zero, subnormal where there are subnormals.

        Raises:
            OverflowError: Where float64 cannot hold it (see `exact_smallest`).
        """
        return _as_float(self.exact_smallest, "smallest", self)

    @property
    def step(self) -> float:
        """The largest power of two that all finite values are whole multiples of.

        Raises:
            OverflowError: Where float64 cannot hold it.

        Example:
            >>> FloatFormat(2, 1).step, FloatFormat(2, 2, signed=False).step
            (0.5, 0.25)
        """
        return _as_float(self._exact_step, "step", self)

    @property
    def max_steps(self) -> int:
        """`max` in steps.

        Example:
            >>> FloatFormat(2, 1).max_steps, FloatFormat(3, 0).max_steps
            (12, 64)
        """
        return int(self.exact_max / self._exact_step)

    @property
    def _exact_step(self) -> Fraction:
        lowest, exponent = self.scaled_magnitude(self.smallest_code)
        # In a binade with a full mantissa all significands occur, odd ones among them.
        only = self.max_code == self.smallest_code
        shift = (lowest & -lowest).bit_length() - 1 if only or not self.mantissa_bits else 0
        return Fraction(2) ** (exponent + shift)

    @property
    def smallest_subnormal(self) -> float | None:
        """Smallest subnormal value, None where there is none."""
        return self.smallest if self.subnormals and self.mantissa_bits else None

    @property
    def smallest_normal(self) -> float | None:
        """Smallest value with a full mantissa, None where all values are subnormal."""
        if not self.subnormals:
            return self.smallest
        if self.max_code >> self.mantissa_bits == 0:
            return None
        return _as_float(Fraction(2) ** self.min_exponent, "smallest_normal", self)

    @property
    def eps(self) -> float | None:
        """Distance from 1 to the next larger value, as in `numpy.finfo`, or None.

        None if 1 is not a value of the format, or is its largest value.
        """
        step = Fraction(2) ** (max(self.min_exponent, 0) - self.mantissa_bits)
        is_value = self.exact_smallest <= 1 and 1 % step == 0
        return float(step) if is_value and self.exact_max > 1 else None

    # The four methods below import a module that is built on this one: the only exception.

    def quantize(self, x: Any, **options: Any) -> Any:
        """Round `x` to this format: `fpformats.quantize` with this format."""
        from fpformats.ops.elementwise import quantize

        return quantize(x, self, **options)

    def encode(self, x: Any, **options: Any) -> Any:
        """Round `x` to this format's codes: `fpformats.encode` with this format."""
        from fpformats.ops.elementwise import encode

        return encode(x, self, **options)

    def decode(self, codes: Any, **options: Any) -> Any:
        """Give the values of `codes`: `fpformats.decode` with this format."""
        from fpformats.ops.elementwise import decode

        return decode(codes, self, **options)

    def values(self) -> NDArray[np.float64]:
        """List the distinct finite values in ascending order: `fpformats.values`."""
        from fpformats.ops.elementwise import values

        return values(self)


def p3109(k: int, p: int, *, signed: bool = True, extended: bool = True) -> FloatFormat:
    """Give a format of IEEE P3109 (interim report 4.0, section 4.2), by its parameters.

    Args:
        k: Width in bits, more than 2.
        p: Precision in bits, one more than the stored mantissa: 0 < p < k, or p <= k if unsigned.
        signed: Whether the format has negative values.
        extended: Whether the format has infinities.

    Returns:
        The format, ``Binary{k}p{p}{s|u}{e|f}``.

    Raises:
        ValueError: If a parameter is out of range, or the exponent would be wider than 16 bits.

    Example:
        >>> p3109(8, 3)
        FloatFormat(Binary8p3se: 8 bits, signed, bias 16, max 49152, P3109 infinities and one NaN)
        >>> p3109(8, 4, extended=False) == FloatFormat(4, 3, specials=Specials.FNUZ)
        True
    """
    if not _is_int(k) or k <= 2:
        raise ValueError(f"k is {k!r}; it must be an integer above 2")
    limit = k - 1 if signed else k
    if not _is_int(p) or not 0 < p <= limit:
        raise ValueError(f"p is {p!r}; it must be an integer from 1 to {limit}")
    exponent_bits = k - p if signed else k - p + 1
    finite = Specials.FNUZ if signed else Specials.NAN_ONLY
    specials = Specials.EXTENDED if extended else finite
    return FloatFormat(exponent_bits, p - 1, signed, 1 << (exponent_bits - 1), specials)


def format_name(fmt: FloatFormat) -> str:
    """Give a format's canonical name, which `parse` turns back into the format.

    Args:
        fmt: The format.

    Returns:
        The name, a valid Python identifier.

    Example:
        >>> format_name(FloatFormat(3, 0, signed=False, bias=-2))
        'E3M0BN2U'
        >>> format_name(FloatFormat(5, 2, specials=Specials.EXTENDED))
        'Binary8p3se'
    """
    if fmt == _BLOCK_SCALE:
        return "E8M0"
    if _is_p3109(fmt):
        sign, domain = "s" if fmt.signed else "u", "e" if fmt.has_infinity else "f"
        return f"Binary{fmt.bits}p{fmt.mantissa_bits + 1}{sign}{domain}"
    name = f"E{fmt.exponent_bits}M{fmt.mantissa_bits}"
    if fmt.bias != default_bias(fmt.exponent_bits, fmt.specials):
        name += f"B{fmt.bias}".replace("-", "N")
    name += "" if fmt.signed else "U"
    name += "" if fmt.subnormals else "NS" if fmt.zero else "NZ"
    bare = bare_specials(fmt.exponent_bits, fmt.mantissa_bits, fmt.signed and fmt.subnormals)
    # Without a suffix, E8M0 is the name of the block scale.
    is_taken = name == "E8M0"
    return name if fmt.specials is bare and not is_taken else name + _SUFFIX_OF[fmt.specials]


def default_bias(exponent_bits: int, specials: Specials) -> int:
    """Give the default bias of a format.

    Args:
        exponent_bits: Width of the exponent field.
        specials: Which codes are special. The bias is larger by one under FNUZ, as in LLVM's
            types, and under EXTENDED, as in IEEE P3109.

    Returns:
        2**(E-1) - 1, or 2**(E-1) under FNUZ and EXTENDED; 0 for E = 0.

    Raises:
        ValueError: If the width is out of range.
    """
    _check_width("exponent_bits", exponent_bits, MAX_EXPONENT_BITS)
    half = (1 << exponent_bits) >> 1
    return half if specials in (Specials.FNUZ, Specials.EXTENDED) else max(0, half - 1)


def bare_specials(exponent_bits: int, mantissa_bits: int, plain: bool) -> Specials:
    """Give the specials of a name without suffix; plain means signed and with subnormals."""
    standard = _STANDARD.get((exponent_bits, mantissa_bits)) if plain else None
    return standard or Specials.FINITE_ONLY


def _is_p3109(fmt: FloatFormat) -> bool:
    """Tell whether a format is an IEEE P3109 format without a shorter name."""
    if fmt.bits <= 2 or fmt.exponent_bits == 0 or not fmt.subnormals:
        return False
    is_ours = fmt.specials is Specials.EXTENDED or (
        fmt.specials is Specials.NAN_ONLY and not fmt.signed
    )
    return is_ours and fmt.bias == 1 << (fmt.exponent_bits - 1)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_width(argument: str, width: int, limit: int) -> None:
    if not _is_int(width) or not 0 <= width <= limit:
        raise ValueError(f"{argument} is {width!r}; it must be an integer from 0 to {limit}")


def _as_float(value: Fraction, fact: str, fmt: FloatFormat) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if number != value:
        raise OverflowError(f"{fact} of {fmt} is beyond float64; exact_max, exact_smallest are not")
    return number


def readable(value: Fraction) -> str:
    """Write a value in full if that is short, else as an integer times a power of two."""
    if value.denominator == 1 and value < 10**9:
        return str(value)
    if 10**-4 <= value < 10**9 and value.denominator <= 1 << 16:
        return str(float(value))
    twos = (value.numerator & -value.numerator).bit_length() - 1
    significand, exponent = value.numerator >> twos, twos - value.denominator.bit_length() + 1
    return f"2**{exponent}" if significand == 1 else f"{significand} * 2**{exponent}"


_BLOCK_SCALE = FloatFormat(
    8, 0, signed=False, specials=Specials.NAN_ONLY, subnormals=False, zero=False
)
"""The block scale of OCP MX 1.0. Its name E8M0 is an exception to the grammar."""
