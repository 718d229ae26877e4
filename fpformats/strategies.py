"""Hypothesis strategies for formats, codes, and the inputs on which rounding goes wrong.

Random floats almost never lie on a tie, a power of two or an overflow threshold. The numbers
drawn here often do.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

try:
    from hypothesis import reject
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fpformats.strategies needs hypothesis: pip install 'msfp[hypothesis]'"
    ) from error

from fpformats import exact
from fpformats.formats import (
    MAX_EXPONENT_BITS,
    MAX_MANTISSA_BITS,
    FloatFormat,
    Specials,
    default_bias,
)
from fpformats.kernels.grid import FLOAT_DTYPES, FloatDtype, holds
from fpformats.rounding import MAX_RANDOM_BITS, Policy, Rounding, Saturation

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

_WIDTHS: dict[str, Literal[16, 32, 64]] = {"float16": 16, "float32": 32, "float64": 64}


def _kind(dtype: str) -> Any:
    """Return NumPy's scalar type of a dtype."""
    if dtype not in _WIDTHS:
        raise ValueError(f"dtype is {dtype!r}; NumPy numbers are drawn of {', '.join(_WIDTHS)}")
    return np.dtype(dtype).type


class _Shape(NamedTuple):
    """The fields of a format except widths and bias, and the biases with which a dtype holds it."""

    specials: Specials
    signed: bool
    subnormals: bool
    zero: bool
    lowest_bias: int
    highest_bias: int


@cache
def _shapes(exponent_bits: int, mantissa_bits: int, dtype: FloatDtype) -> tuple[_Shape, ...]:
    """Return the formats of the two widths that a dtype holds, the plainest first."""
    shapes = []
    kinds = [(True, True), (False, True), (False, False)]
    for specials, signed, (subnormals, zero) in itertools.product(Specials, (True, False), kinds):
        try:
            fmt = FloatFormat(exponent_bits, mantissa_bits, signed, 0, specials, subnormals, zero)
        except ValueError:  # such a format does not exist
            continue
        # The exponents of all values fall by one when the bias grows by one.
        lowest = fmt.max_exponent - dtype.bias
        smallest_step = fmt.scaled_magnitude(fmt.smallest_code)[1]
        highest = smallest_step - dtype.min_exponent + dtype.mantissa_bits
        if fmt.max_code > 0 and lowest <= highest and holds(dtype, replace(fmt, bias=highest)):
            shapes.append(_Shape(specials, signed, subnormals, zero, lowest, highest))
    return tuple(shapes)


@st.composite
def formats(draw: DrawFn, dtype: str = "float64", max_bits: int = 64) -> FloatFormat:
    """Draw formats that a dtype holds, of all widths, biases, specials and signs.

    Args:
        draw: Given by Hypothesis.
        dtype: Name of the dtype.
        max_bits: Largest number of bits of a code, at least 3.

    Returns:
        A format with at least two finite values.

    Raises:
        ValueError: If there is no such dtype.
    """
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(FLOAT_DTYPES)}")
    holder = FLOAT_DTYPES[dtype]
    exponents = holder.bias - holder.min_exponent + holder.mantissa_bits
    widest = min(exponents.bit_length() - 1, MAX_EXPONENT_BITS, max_bits - 1)
    exponent_bits = draw(st.integers(0, widest))
    most = min(holder.mantissa_bits, MAX_MANTISSA_BITS, max_bits - 1 - exponent_bits)
    mantissa_bits = draw(st.integers(0 if exponent_bits else 1, most))
    shape = draw(st.sampled_from(_shapes(exponent_bits, mantissa_bits, holder)))
    low, high = shape.lowest_bias, shape.highest_bias
    usual = min(max(default_bias(exponent_bits, shape.specials), low), high)
    near = st.integers(max(usual - 3, low), min(usual + 3, high))
    return FloatFormat(
        exponent_bits,
        mantissa_bits,
        shape.signed,
        draw(st.just(usual) | near | st.integers(low, high)),
        shape.specials,
        shape.subnormals,
        shape.zero,
    )


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
    magnitudes = st.integers(0, fmt.max_code)
    if fmt.signed:
        signs = st.booleans()
        finite = st.builds(_signed_code, magnitudes, signs, st.just(fmt))
        return finite.map(lambda code: exact.decode(code, fmt))
    return magnitudes.map(lambda code: exact.decode(code, fmt))


def _signed_code(magnitude: int, negative: bool, fmt: FloatFormat) -> int:
    """Return the code of a magnitude with a sign; without the sign if that code is NaN."""
    code = magnitude | negative << fmt.magnitude_bits
    return magnitude if code == fmt.nan_code else code


@st.composite
def ties(draw: DrawFn, fmt: FloatFormat) -> Fraction:
    """Draw midpoints of adjacent finite values of a format, of both signs if it is signed."""
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

    Raises:
        ValueError: If the dtype is not one of these.
    """
    kind = _kind(dtype)
    number = kind(float(draw(ties(fmt) | values_of(fmt))))
    direction = number.dtype.type(draw(st.sampled_from([-math.inf, math.inf])))
    for _ in range(draw(st.integers(0, 2))):
        number = np.nextafter(number, direction)
    return number


def floats(dtype: str = "float32") -> SearchStrategy[Any]:
    """Draw NumPy numbers of a dtype, often powers of two and their neighbours.

    Args:
        dtype: "float16", "float32" or "float64".

    Returns:
        Strategy of NumPy scalars, including zeros, subnormals, infinities and NaN.

    Raises:
        ValueError: If the dtype is not one of these.
    """
    kind = _kind(dtype)
    info = np.finfo(dtype)
    lowest = int(info.minexp) - int(info.nmant)
    powers = st.integers(lowest, int(info.maxexp) - 1).map(lambda e: kind(math.ldexp(1.0, e)))
    around = st.sampled_from([-math.inf, math.inf]).map(kind)
    edges = st.builds(np.nextafter, powers, around) | powers
    signed = st.builds(np.copysign, edges, st.sampled_from([-1.0, 1.0]).map(kind))
    return signed | st.floats(width=_WIDTHS[dtype]).map(kind)
