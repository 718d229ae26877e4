"""Schemes: which grids are searched for the weights and inputs of a layer.

To add a scheme, add an entry to `SCHEMES` and its key to `msfp.config.Scheme`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fpformats import FloatFormat, Specials
from msfp.config import BLOCK_SCHEMES, Scheme

MAX_EXPONENT_BITS = 5


def float_formats(bits: int, *, signed: bool) -> list[FloatFormat]:
    """Return the finite-only formats of a width, from the finest mantissa to the widest range.

    Example:
        >>> [str(fmt) for fmt in float_formats(4, signed=False)]
        ['E1M3U', 'E2M2U', 'E3M1U', 'E4M0U']
    """
    free = bits - signed
    return [
        FloatFormat(e, free - e, signed=signed, specials=Specials.FINITE_ONLY)
        for e in range(1, min(free, MAX_EXPONENT_BITS) + 1)
    ]


def integer_formats(bits: int, *, signed: bool) -> list[FloatFormat]:
    """Return the integer format of a width, symmetric if signed: E0My has a uniform step.

    Example:
        >>> integer_formats(4, signed=True)[0].values().tolist() == [v / 4 for v in range(-7, 8)]
        True
    """
    return [FloatFormat(0, bits - signed, signed=signed, specials=Specials.FINITE_ONLY)]


def formats_like(fmt: FloatFormat) -> list[FloatFormat]:
    """Return all formats of the same kind (floating point or integer), width and sign.

    Example:
        >>> [str(fmt) for fmt in formats_like(FloatFormat(2, 1))]
        ['E1M2', 'E2M1', 'E3M0']
    """
    formats = float_formats if fmt.exponent_bits else integer_formats
    return formats(fmt.bits, signed=fmt.signed)


@dataclass(frozen=True)
class ScaledScheme:
    """A scheme with one scale for each channel or tensor of weights, and one scale for inputs.

    Attributes:
        formats: Returns the formats to search, given a width and a sign.
        unsigned: Whether asymmetric inputs may have unsigned formats with a zero point.
        clips: Whether scales are searched. If not, the largest magnitude becomes the largest value
            of the format.
        refined: Whether weights are refined by default.
    """

    formats: Callable[..., list[FloatFormat]]
    unsigned: bool = False
    clips: bool = True
    refined: bool = False


@dataclass(frozen=True)
class BlockScheme:
    """A scheme in which each block of elements shares a scale.

    Attributes:
        formats: Names of the block formats, by width.
        refined: Whether weights are refined by default.
    """

    formats: dict[int, str]
    refined: bool = False


SCHEMES: dict[Scheme, ScaledScheme | BlockScheme] = {
    "mixup": ScaledScheme(float_formats, unsigned=True, refined=True),
    "signed": ScaledScheme(float_formats, refined=True),
    "int_minmax": ScaledScheme(integer_formats, clips=False),
    "int_mse": ScaledScheme(integer_formats),
    "int_zero_point": ScaledScheme(integer_formats, unsigned=True),
    "mx": BlockScheme(BLOCK_SCHEMES["mx"], refined=True),
    "nvfp4": BlockScheme(BLOCK_SCHEMES["nvfp4"], refined=True),
    "nvfp4_int4": BlockScheme(BLOCK_SCHEMES["nvfp4_int4"], refined=True),
}
"""All schemes, by name."""


def scaled_scheme(name: Scheme) -> ScaledScheme:
    """Return the scheme with a name, which must not be a block scheme.

    Raises:
        ValueError: If it is a block scheme.
    """
    scheme = SCHEMES[name]
    if isinstance(scheme, BlockScheme):
        raise ValueError(f"scheme {name!r} is a block scheme")
    return scheme
