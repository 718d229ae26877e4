"""Laws that hold for every format, whatever the definition says in detail."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fpformats import FloatFormat, decode, encode, exact, quantize, strategies

pytestmark = pytest.mark.usefixtures("backend")

MODES = ["NearestTiesToEven", "NearestTiesToAway", "TowardZero", "TowardPositive"]
MODES += ["TowardNegative", "ToOdd"]
lawful = settings(max_examples=60, deadline=None)


def inputs(data, fmt):
    return float(data.draw(strategies.near_ties(fmt, "float64") | strategies.floats("float64")))


@pytest.mark.parametrize("mode", MODES)
@lawful
@given(data=st.data())
def test_rounding_again_changes_nothing_and_order_is_kept(mode, data):
    fmt = data.draw(strategies.formats())
    x, y = sorted(inputs(data, fmt) for _ in range(2))
    assume(not math.isnan(x) and not math.isnan(y))
    rounded = [quantize(v, fmt, rounding=mode) for v in (x, y)]
    assert rounded[0] <= rounded[1]
    assert [quantize(v, fmt, rounding=mode) for v in rounded] == rounded


@lawful
@given(data=st.data())
def test_down_and_up_enclose_and_mirror_one_another(data):
    e, m = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 20))
    fmt = FloatFormat(
        e, m, bias=data.draw(st.integers(-9, 99)), subnormals=data.draw(st.booleans())
    )
    x = float(data.draw(strategies.near_ties(fmt, "float64")))
    assume(abs(x) <= fmt.exact_max)
    down, up = (quantize(x, fmt, rounding=mode) for mode in ("TowardNegative", "TowardPositive"))
    assert down <= x <= up
    assert up == -quantize(-x, fmt, rounding="TowardNegative")
    assert quantize(x, fmt) in (down, up)
    assert quantize(x, fmt, rounding="ToOdd") in (down, up)
    toward_zero = quantize(x, fmt, rounding="TowardZero")
    assert toward_zero == (down if x > 0 else up)


@lawful
@given(data=st.data())
def test_nearest_is_within_half_a_gap(data):
    fmt = data.draw(strategies.formats(max_bits=12))
    code = data.draw(st.integers(fmt.smallest_code, fmt.max_code))
    value = Fraction(exact.decode(code, fmt))
    lower = Fraction(exact.decode(code - 1, fmt)) if code > 0 else Fraction(0)
    x = float(data.draw(st.fractions(lower, value)))
    assume(lower <= x <= value)
    reach = value - lower if code == 0 else (value - lower) / 2
    assert abs(Fraction(quantize(x, fmt)) - Fraction(x)) <= reach


@lawful
@given(data=st.data())
def test_codes_and_values_are_in_bijection(data):
    fmt = data.draw(strategies.formats())
    code = data.draw(strategies.codes(fmt))
    value = decode(code, fmt, dtype="float64")
    if math.isnan(value):
        assert encode(value, fmt) == fmt.nan_code
    else:
        assert encode(value, fmt, saturation="SatPropagate") == code


@lawful
@given(data=st.data(), shift=st.integers(-20, 20))
def test_shifting_the_bias_scales_the_grid_under_any_policy(data, shift):
    e, m = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 8))
    fmt, shifted = FloatFormat(e, m, bias=5), FloatFormat(e, m, bias=5 - shift)
    policy, x = data.draw(strategies.policies()), float(data.draw(strategies.near_ties(fmt)))
    random = policy.pop("random")
    policy["random"] = None if random is None else np.array(random)
    scaled = quantize(math.ldexp(x, shift), shifted, **policy)
    expected = math.ldexp(quantize(x, fmt, **policy), shift)
    assert scaled == expected or (math.isnan(scaled) and math.isnan(expected))


@lawful
@given(data=st.data())
def test_odd_with_two_more_bits_then_nearest_is_nearest(data):
    e, m = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 10))
    signed = data.draw(st.booleans())
    fmt, wider = FloatFormat(e, m, signed), FloatFormat(e, m + 2, signed)
    x = inputs(data, fmt)
    assume(not math.isnan(x))
    assert quantize(quantize(x, wider, rounding="ToOdd"), fmt) == quantize(x, fmt)


@lawful
@given(data=st.data())
def test_unsigned_formats_are_the_upper_half_of_signed_ones(data):
    e, m = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 10))
    mode = data.draw(st.sampled_from(MODES))
    x = abs(inputs(data, FloatFormat(e, m)))
    assume(not math.isnan(x))
    signed, unsigned = (FloatFormat(e, m, sign) for sign in (True, False))
    assert quantize(x, unsigned, rounding=mode) == quantize(x, signed, rounding=mode)
    assert encode(x, unsigned, rounding=mode) == encode(x, signed, rounding=mode)
