import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from fpformats import Specials, decode, exact, parse, quantize, strategies
from fpformats.kernels.grid import FLOAT_DTYPES, holds


@given(data=st.data(), dtype=st.sampled_from(list(FLOAT_DTYPES)), bits=st.integers(3, 64))
def test_formats_fit_their_dtype(data, dtype, bits):
    fmt = data.draw(strategies.formats(dtype, max_bits=bits))
    assert holds(FLOAT_DTYPES[dtype], fmt)
    assert 1 <= fmt.bits <= bits


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_no_draw_of_a_format_is_thrown_away(dtype):
    drawn = 0

    @settings(max_examples=200, database=None, deadline=None)
    @given(strategies.formats(dtype))
    def count(_fmt):
        nonlocal drawn
        drawn += 1

    count()
    assert drawn == 200


@given(data=st.data(), fmt=strategies.formats())
def test_values_of_a_format_are_finite(data, fmt):
    assert exact.is_finite(data.draw(strategies.values_of(fmt)))


@pytest.mark.parametrize("specials", Specials)
def test_formats_of_every_kind_are_drawn(specials):
    find(strategies.formats(), lambda fmt: fmt.specials is specials)
    find(strategies.formats(), lambda fmt: not fmt.subnormals and fmt.bias < 0)


@given(st.data())
def test_codes_values_and_ties_belong_to_the_format(data):
    fmt = parse(data.draw(st.sampled_from(["E2M1", "E4M3", "E3M0U"])))
    assert decode(data.draw(strategies.codes(fmt)), fmt) is not None
    value = data.draw(strategies.values_of(fmt))
    assert quantize(float(value), fmt) == value
    tie = data.draw(strategies.ties(fmt))
    step = Fraction(1, 10**9)
    assert exact.quantize(tie - step, fmt) != exact.quantize(tie + step, fmt)


def is_just_below_a_power_of_two(x):
    return np.isfinite(x) and np.frexp(x)[0] != 0.5 and np.frexp(np.nextafter(x, x * 2))[0] == 0.5


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_inputs_near_ties_and_edges_are_of_the_dtype(dtype):
    fmt, kind = parse("E2M1"), np.dtype(dtype).type

    def found(strategy, condition):
        return find(strategy, condition, random=random.Random(0))

    above = np.nextafter(kind(1.25), kind(9))
    assert found(strategies.near_ties(fmt, dtype), lambda x: x == above) == above
    assert found(strategies.near_ties(fmt, dtype), lambda x: x == kind(-1.25)) == -1.25
    assert np.isnan(found(strategies.floats(dtype), np.isnan))
    assert type(found(strategies.floats(dtype), is_just_below_a_power_of_two)) is kind


def test_dtypes_that_numpy_does_not_have_are_refused():
    for strategy in (
        lambda: strategies.floats("bfloat16"),
        lambda: strategies.near_ties(parse("E2M1"), "bfloat16"),
        lambda: strategies.formats("f8"),
    ):
        with pytest.raises(ValueError, match=r"(dtype is 'bfloat16'; NumPy|dtype is 'f8'; allow)"):
            find(strategy(), lambda _: True)


def test_without_hypothesis_the_extra_is_named():
    code = "import sys; sys.modules['hypothesis'] = None; import fpformats.strategies"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert run.returncode
    assert "fpformats.strategies needs hypothesis: pip install 'msfp[hypothesis]'" in run.stderr
