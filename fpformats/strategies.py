"""Hypothesis strategies for formats, codes, and the inputs on which rounding goes wrong.

Random floats almost never lie on a tie, a power of two or an overflow threshold: these do.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st

from fpformats import exact
from fpformats.formats import (
    MAX_EXPONENT_BITS,
    MAX_MANTISSA_BITS,
    FloatFormat,
    Specials,
    default_bias,
)
from fpformats.kernels.grid import CARRIERS, holds
from fpformats.rounding import MAX_RANDOM_BITS, Policy, Rounding, Saturation

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

_WIDTHS: dict[str, Literal[16, 32, 64]] = {"float16": 16, "float32": 32, "float64": 64}


@st.composite
def formats(draw: DrawFn, carrier: str = "float64", max_bits: int = 64) -> FloatFormat:
    """Draw formats that a carrier holds: of all widths, biases, specials and signs.

    Args:
        draw: Given by Hypothesis.
        carrier: Name of the carrier dtype.
        max_bits: Most bits that a code may have, at least 3.

    Returns:
        A format.
    """
    exponent_bits = draw(st.integers(0, min(MAX_EXPONENT_BITS, max_bits - 1)))
    mantissa_bits = draw(st.integers(0, min(MAX_MANTISSA_BITS, max_bits - 1 - exponent_bits)))
    specials = draw(st.sampled_from(Specials))
    usual = default_bias(exponent_bits, specials)
    reach = 2 * CARRIERS[carrier].bias
    bias = draw(st.just(usual) | st.integers(usual - 3, usual + 3) | st.integers(-reach, reach))
    subnormals, signed = draw(st.booleans()), draw(st.booleans())
    zero = subnormals or draw(st.booleans())
    try:
        fmt = FloatFormat(exponent_bits, mantissa_bits, signed, bias, specials, subnormals, zero)
    except ValueError:
        reject()
    if not holds(CARRIERS[carrier], fmt):
        reject()
    return fmt


@st.composite
def policies(draw: DrawFn) -> dict[str, Any]:
    """Draw options for `fpformats.quantize`: rounding, saturation, random word and its bits.

    Args:
        draw: Given by Hypothesis.

    Returns:
        The keyword arguments "rounding", "saturation", "random_bits" and "random": one word, or
        None for the modes that use none.
    """
    rounding = draw(st.sampled_from(Rounding)).value
    bits = draw(st.integers(1, MAX_RANDOM_BITS))
    word = draw(st.integers(0, 2**bits - 1)) if Policy(rounding).is_stochastic else None
    saturation = draw(st.sampled_from(Saturation)).value
    return {"rounding": rounding, "saturation": saturation, "random_bits": bits, "random": word}


def codes(fmt: FloatFormat) -> SearchStrategy[int]:
    """Draw any code of a format, special ones included."""
    return st.integers(0, fmt.code_count - 1)


def values_of(fmt: FloatFormat) -> SearchStrategy[Fraction | float]:
    """Draw the finite values of a format, as `fpformats.exact` gives them."""
    return codes(fmt).map(lambda code: exact.decode(code, fmt)).filter(exact.is_finite)


@st.composite
def ties(draw: DrawFn, fmt: FloatFormat) -> Fraction:
    """Draw the midpoints of adjacent finite values of a format, of both signs if it has them."""
    if fmt.max_code == 0:
        reject()
    lower = draw(st.integers(0, fmt.max_code - 1))
    middle = (Fraction(exact.decode(lower, fmt)) + Fraction(exact.decode(lower + 1, fmt))) / 2
    return -middle if fmt.signed and draw(st.booleans()) else middle


@st.composite
def near_ties(draw: DrawFn, fmt: FloatFormat, dtype: str = "float32") -> Any:
    """Draw NumPy numbers at most two steps of their dtype from a tie or a value of a format.

    Args:
        draw: Given by Hypothesis.
        fmt: A format that the dtype holds.
        dtype: "float16", "float32" or "float64".

    Returns:
        A NumPy scalar of the dtype.
    """
    middle = draw(ties(fmt) | values_of(fmt))
    number = np.dtype(dtype).type(float(middle))
    direction = number.dtype.type(draw(st.sampled_from([-math.inf, math.inf])))
    for _ in range(draw(st.integers(0, 2))):
        number = np.nextafter(number, direction)
    return number


def floats(dtype: str = "float32") -> SearchStrategy[Any]:
    """Draw NumPy numbers of a dtype, powers of two and their neighbours often among them.

    Args:
        dtype: "float16", "float32" or "float64".

    Returns:
        Strategy of NumPy scalars: zeros, subnormals, infinities and NaN included.
    """
    kind = np.dtype(dtype).type
    info = np.finfo(dtype)
    lowest = int(info.minexp) - int(info.nmant)
    powers = st.integers(lowest, int(info.maxexp) - 1).map(lambda e: kind(math.ldexp(1.0, e)))
    around = st.sampled_from([-math.inf, math.inf]).map(kind)
    edges = st.builds(np.nextafter, powers, around) | powers
    signed = st.builds(np.copysign, edges, st.sampled_from([-1.0, 1.0]).map(kind))
    return signed | st.floats(width=_WIDTHS[dtype]).map(kind)
