"""Inputs on which rounding goes wrong, and what they must become, by the definition."""

import contextlib
import functools
import itertools
import math
from fractions import Fraction
from itertools import pairwise

import gfloat.formats
import numpy as np

from fpformats import FloatFormat, Rounding, Saturation, Specials, exact
from fpformats.kernels.grid import FLOAT_DTYPES, holds

GFLOAT_FORMATS = [
    ("E4M3", gfloat.formats.format_info_ocp_e4m3),
    ("E5M2", gfloat.formats.format_info_ocp_e5m2),
    ("E2M1", gfloat.formats.format_info_ocp_e2m1),
    ("E2M3", gfloat.formats.format_info_ocp_e2m3),
    ("E3M2", gfloat.formats.format_info_ocp_e3m2),
]
"""Names of formats and what gfloat calls them."""


def small_formats():
    """Every finite-only format of up to 8 bits below the sign, and the standards' special ones."""
    formats = [
        FloatFormat(e, m, signed)
        for e in range(9)
        for m in range(9 - e)
        for signed in (True, False)
        if e + m > 0
    ]
    for specials in (Specials.NAN_ONLY, Specials.IEEE, Specials.FNUZ):
        formats += [FloatFormat(e, 7 - e, specials=specials) for e in range(1, 8)]
    formats += [FloatFormat(e, 4 - e, specials=Specials.NAN_ONLY, signed=False) for e in range(4)]
    formats += [FloatFormat(e, 5 - e, subnormals=False) for e in range(1, 5)]
    formats += [FloatFormat(e, 5 - e, signed=False, subnormals=False) for e in range(1, 5)]
    formats += [FloatFormat(4, 3, bias=11, specials=Specials.FNUZ), FloatFormat(2, 1, bias=-40)]
    return formats


def edge_formats():
    """Formats at the ends of what a dtype holds, where an intermediate might not fit."""
    return [
        *(FloatFormat(2, m, bias=150 - m) for m in range(4)),
        *(FloatFormat(8, m, bias=128) for m in range(6)),
        *(FloatFormat(8, m, bias=150 - m, signed=False) for m in (0, 1, 3, 7)),
        *(FloatFormat(3, m, bias=-120) for m in (0, 1, 5)),
        FloatFormat(8, 3, bias=140, subnormals=False),
        FloatFormat(8, 4, bias=140, specials=Specials.FNUZ),
        FloatFormat(0, 8, bias=-127),
        FloatFormat(1, 7, bias=-126),
        FloatFormat(0, 1, bias=148),
        FloatFormat(1, 0, bias=-126, signed=False),
    ]


def wide_formats():
    """Formats whose codes are too many to visit, up to all that float64 has."""
    ieee = Specials.IEEE
    return [
        FloatFormat(5, 10, specials=ieee),
        FloatFormat(8, 7, specials=ieee),
        FloatFormat(8, 10, specials=ieee),
        FloatFormat(8, 23, specials=ieee),
        FloatFormat(8, 22, specials=ieee),
        FloatFormat(8, 21, specials=ieee),
        FloatFormat(4, 21),
        FloatFormat(4, 22),
        FloatFormat(4, 23, signed=False),
        FloatFormat(0, 24),
        FloatFormat(0, 24, bias=-127),
        FloatFormat(11, 52, specials=ieee),
        FloatFormat(11, 51, specials=ieee),
        FloatFormat(11, 50, specials=ieee),
        FloatFormat(5, 52),
        FloatFormat(11, 0, bias=1024),
        FloatFormat(11, 0, bias=1074, signed=False),
        FloatFormat(11, 3, bias=1050, subnormals=False),
        FloatFormat(11, 40, bias=1030, specials=Specials.FNUZ),
        FloatFormat(2, 52, bias=1023),
        FloatFormat(10, 12),
    ]


def dtypes_of(fmt, names=("float32", "float64")):
    return [name for name in names if holds(FLOAT_DTYPES[name], fmt)]


@functools.cache
def magnitudes(fmt):
    """All finite values >= 0 in code order, as fractions, from the definition."""
    return [Fraction(exact.decode(code, fmt)) for code in range(fmt.max_code + 1)]


@functools.cache
def boundaries(fmt, dtype):
    """Give inputs around every value and midpoint of a format, and the codes that they take.

    Inputs are, for every value and every midpoint of neighbours, the number itself where the
    dtype has it, and the nearest numbers of the dtype below and above; then what overflows.
    """
    listed = magnitudes(fmt)
    inputs, codes = [], []
    middles = [(low + high) / 2 for low, high in pairwise(listed)]
    for code, value in enumerate(listed):
        below, at, above = _around(value, dtype)
        assert at is not None, "the dtype must hold the format"
        near = [at]
        # Where the dtype is no finer than the format, the neighbours lie beyond the midpoints.
        near += [below] * (code > 0 and below > middles[code - 1])
        near += [above] * (value == listed[-1] or above < middles[code])
        inputs += near
        codes += [code] * len(near)
    for code, middle in enumerate(middles):
        below, at, above = _around(middle, dtype)
        inputs += [below, above]
        codes += [code, code + 1]
        if at is not None:
            inputs.append(at)
            codes.append(code + code % 2)
    top = len(listed) - 1
    overflow = [float(np.finfo(dtype).max), math.inf]
    for factor in (Fraction(5, 4), Fraction(3, 2), Fraction(2), Fraction(4)):
        overflow += [x for x in _around(listed[-1] * factor, dtype) if x is not None]
    inputs += [x for x in overflow if x >= listed[-1]]
    codes += [top] * sum(x >= listed[-1] for x in overflow)
    return np.array(inputs, dtype=dtype), np.array(codes, dtype=np.int64)


def signed_boundaries(fmt, dtype):
    """Give `boundaries` with both signs, negative zero among them, and expected codes."""
    x, codes = boundaries(fmt, dtype)
    if not fmt.signed:
        negative = np.zeros_like(codes)
    elif fmt.has_negative_zero:
        negative = codes + (1 << fmt.magnitude_bits)
    else:
        negative = np.where(codes == 0, 0, codes + (1 << fmt.magnitude_bits))
    return np.concatenate([x, -x]), np.concatenate([codes, negative])


def values_at(codes, fmt, dtype):
    """Give the values of codes by the definition, in a dtype that holds them."""
    return _all_values(fmt).astype(dtype)[codes]


@functools.cache
def _all_values(fmt):
    return np.array([float(exact.decode(code, fmt)) for code in range(fmt.code_count)])


def assert_same_bits(actual, expected):
    """Assert that two arrays agree bit for bit, but for the payload of NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    alike = (actual == expected) & (np.signbit(actual) == np.signbit(expected))
    if (alike | (np.isnan(actual) & np.isnan(expected))).all():
        return
    # These say where arrays differ, and take longer.
    np.testing.assert_array_equal(actual, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual[numbers]), np.signbit(expected[numbers]))
    raise AssertionError("the arrays differ")


def _around(exact_value, dtype):
    """Give the dtype's nearest numbers below, at (or None) and above a value."""
    kind = np.dtype(dtype).type
    with np.errstate(over="ignore"):
        near = kind(float(exact_value)) if exact_value < 2**1024 else kind(math.inf)
    at_value = math.isfinite(near) and Fraction(float(near)) == exact_value
    below = np.nextafter(near, kind(-math.inf)) if at_value or near > exact_value else near
    above = np.nextafter(near, kind(math.inf)) if at_value or near < exact_value else near
    return float(below), float(near) if at_value else None, float(above)


MODES = [mode.value for mode in Rounding if not mode.value.startswith("Stochastic")]
STOCHASTIC = [mode.value for mode in Rounding if mode.value.startswith("Stochastic")]
SATURATIONS = [mode.value for mode in Saturation]


@functools.cache
def every_format(max_bits):
    """Every format of up to some bits below the sign: all specials, without subnormals or zero."""
    formats = []
    pairs = [(e, total - e) for total in range(max_bits + 1) for e in range(total + 1)]
    for e, m in pairs:
        for signed, specials in itertools.product((True, False), Specials):
            for subnormals, zero in ((True, True), (False, True), (False, False)):
                with contextlib.suppress(ValueError):
                    bias = 127 if e == 8 and specials is not Specials.IEEE else None
                    bias = bias if zero else bias and bias - 1
                    formats.append(FloatFormat(e, m, signed, bias, specials, subnormals, zero))
    return list(dict.fromkeys(formats))


@functools.cache
def ladder(fmt):
    """Give the magnitudes from zero to one step above the largest, and the code of each.

    A missing zero has the code -1. Float64 must hold the values and their midpoints.
    """
    listed = [float(value) for value in magnitudes(fmt)]
    codes = list(range(len(listed)))
    if not fmt.zero:
        listed, codes = [0.0, *listed], [-1, *codes]
    lowest = 1 - fmt.bias if fmt.subnormals else -fmt.bias
    exponent = max(math.frexp(listed[-1])[1] - 1, lowest)
    listed.append(listed[-1] + math.ldexp(1.0, exponent - fmt.mantissa_bits))
    return np.array(listed), np.array([*codes, codes[-1] + 1])


@functools.cache
def aimed_inputs(fmt, dtype):
    """Give every value and midpoint of a format, its neighbours in a dtype, and the extremes."""
    listed, _ = ladder(fmt)
    info = np.finfo(dtype)
    points = np.concatenate([listed, (listed[1:] + listed[:-1]) / 2, [listed[-1] * 3]])
    with np.errstate(over="ignore"):
        x = points.astype(dtype)
    x = np.concatenate([x, np.nextafter(x, info.max), np.nextafter(x, -info.max)])
    x = np.concatenate([x, np.array([0.0, info.max, info.smallest_subnormal, math.inf, math.nan])])
    x = x.astype(dtype)
    return np.concatenate([x, -x])


def definition_by_table(x, fmt, mode, saturation):
    """Round by looking neighbours up in the table of values, in float64.

    What saturation does is taken from `exact`, of one number of each kind.
    """
    listed, codes = ladder(fmt)
    magnitude, negative = np.abs(np.where(np.isfinite(x), x, 0)).astype(np.float64), np.signbit(x)
    low = np.searchsorted(listed, magnitude, side="right") - 1
    low = np.minimum(low, len(listed) - 2)
    below, above = listed[low], listed[low + 1]
    odd, inexact = codes[low] % 2 == 1, magnitude > below
    up = {
        "NearestTiesToEven": (magnitude > (below + above) / 2)
        | ((magnitude == (below + above) / 2) & odd),
        "NearestTiesToAway": magnitude >= (below + above) / 2,
        "TowardZero": np.zeros_like(odd),
        "TowardPositive": inexact & ~negative,
        "TowardNegative": inexact & negative,
        "ToOdd": inexact & ~odd,
    }[mode] | (magnitude >= above)
    result = listed[low + up]

    def outcome(example):
        return float(exact.quantize(example, fmt, mode, saturation))

    far = Fraction(listed[-1]) * 3
    over, nothing = low + up == len(listed) - 1, (result == 0) & (not fmt.zero)
    signed = np.where(negative, -result if fmt.signed else np.where(result > 0, np.nan, 0), result)
    below_range = negative & (over if fmt.signed else result > 0)
    signed = np.where(over & ~negative, outcome(far), signed)
    signed = np.where(below_range, outcome(-far), signed)
    signed = np.where(nothing, np.where(negative, outcome(-0.0), outcome(0.0)), signed)
    signed = np.where(
        np.isinf(x), np.where(negative, outcome(-math.inf), outcome(math.inf)), signed
    )
    signed = np.where(np.isnan(x), np.nan, signed)
    return signed if fmt.has_negative_zero else signed + 0.0
