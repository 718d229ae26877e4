"""Values of a format as whole numbers of steps."""

import copy
import itertools
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpformats import (
    FloatFormat,
    StepEncoder,
    decode_scaled,
    encode_scaled,
    encode_steps,
    exact,
    parse,
    quantize,
    strategies,
    values,
)

on_backends = pytest.mark.usefixtures("backend")
NARROW = [
    FloatFormat(exponent, 4 - signed - exponent, signed=signed)
    for signed in (True, False)
    for exponent in range(4 - signed + 1)
]
FITTING = [fmt for fmt in NARROW if fmt.max_steps <= (127 if fmt.signed else 255)]
"""All formats of four bits but E4M0U, whose largest value is 16384 steps."""
WIDER = [
    parse(name) for name in ("E2M2", "E3M1", "E2M3U", "E2M4U", "E1M6", "E0M7", "E2M4U", "E0M8U")
]
scales = st.floats(2.0**-20, 2.0**20, width=32).map(np.float32)


def most(fmt, dtype):
    """The largest number of steps that a dtype holds."""
    return 127 if fmt.signed or dtype == "int8" else 255


def every_format(bits):
    """All formats of a number of bits, with and without subnormals."""
    for signed, subnormals in itertools.product((True, False), repeat=2):
        for exponent in range(bits - signed + 1):
            mantissa = bits - signed - exponent
            try:
                yield FloatFormat(exponent, mantissa, signed=signed, subnormals=subnormals)
            except ValueError:
                continue


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_step_is_the_largest_power_of_two_that_divides_all_values(bits):
    for fmt in every_format(bits):
        finite = [Fraction(float(v)) for v in values(fmt) if np.isfinite(v) and v]
        step = Fraction(fmt.step)
        counts = [v / step for v in finite]
        assert all(count.denominator == 1 for count in counts), fmt
        assert math.gcd(*(int(count) for count in counts)) % 2 == 1, fmt
        assert fmt.max_steps == max(abs(count) for count in counts), fmt


def test_all_formats_of_four_bits_but_one_fit_a_byte():
    assert {str(fmt) for fmt in NARROW} - {str(fmt) for fmt in FITTING} == {"E4M0U"}
    assert [parse(name).max_steps for name in ("E1M2", "E2M1", "E3M0", "E1M3U", "E2M2U", "E3M1U")] \
        == [7, 12, 64, 15, 28, 192]  # fmt: skip


@on_backends
@pytest.mark.parametrize(
    "fmt", FITTING + [pytest.param(fmt, marks=pytest.mark.slow) for fmt in WIDER], ids=str
)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), scale=scales, shift=st.none() | st.integers(-300, 300))
def test_steps_are_those_of_the_codes(fmt, data, scale, shift):
    zero = None if shift is None else np.float32(shift) * np.float32(fmt.step) * scale
    aimed = st.lists(strategies.near_ties(fmt) | strategies.floats(), min_size=1, max_size=8)
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.array(data.draw(aimed), dtype=np.float32) * scale
        x = x[~np.isnan(x)] if zero is None else x[~np.isnan(x)] + zero
        v = (x if zero is None else x - zero) / scale
    defined = [exact.quantize(float(ratio), fmt) / Fraction(fmt.step) for ratio in v]
    codes = encode_scaled(x, fmt, scale, zero)
    assert np.array_equal(
        decode_scaled(codes, fmt, 1.0) / np.float32(fmt.step), np.float32(defined)
    )
    for dtype in ("uint8", "int8"):
        if fmt.max_steps > most(fmt, dtype):
            continue
        offset = 128 if fmt.signed and dtype == "uint8" else 0
        expected = np.array([int(each) + offset for each in defined], dtype)
        for array in (x, torch.from_numpy(x)):
            found = encode_steps(array, fmt, scale, zero, dtype=dtype)
            assert type(found) is type(array)
            assert str(found.dtype).removeprefix("torch.") == dtype
            assert np.array_equal(np.asarray(found), expected)


@on_backends
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("fmt", FITTING, ids=str)
def test_every_dtype_of_input_is_counted_as_it_is_rounded(fmt, dtype):
    x = (
        torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
        * 3
    )
    x[0, :3] = torch.tensor([math.inf, -math.inf, -0.0])
    rounded = quantize(x.float() if x.element_size() == 2 else x, fmt) / fmt.step
    expected = rounded.to(torch.int64) + 128 * fmt.signed
    assert torch.equal(encode_steps(x, fmt).long(), expected)
    if dtype != "bfloat16":
        assert np.array_equal(encode_steps(x.numpy(), fmt), expected.numpy())


@on_backends
def test_scales_of_channels_and_any_strides_are_taken():
    fmt, x = parse("E2M1"), torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    scale, one = (
        torch.rand(6, 1, 1, generator=torch.Generator().manual_seed(1)) + 0.5,
        torch.tensor(0.7),
    )
    for strided in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 2), x[:, ::2]):
        each = scale if strided.shape[1] == 6 else torch.full((strided.shape[1], 1, 1), 0.6)
        for by in (each, one):
            expected = quantize(strided.contiguous() / by, fmt) / fmt.step
            assert torch.equal(encode_steps(strided, fmt, by, dtype="int8").float(), expected)


def test_the_order_in_memory_is_kept_where_one_scale_is_for_all():
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    found = encode_steps(x, parse("E2M1"), 0.5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@on_backends
def test_results_are_written_to_out():
    fmt, x = parse("E2M2U"), torch.rand(1000)
    expected = encode_steps(x, fmt, 0.3)
    out = torch.empty(1000, dtype=torch.uint8)
    assert encode_steps(x, fmt, 0.3, out=out) is out
    assert torch.equal(out, expected)
    with pytest.raises(TypeError, match="out is"):
        encode_steps(x, fmt, 0.3, out=x)


@on_backends
def test_numbers_and_empty_arrays_are_taken():
    assert encode_steps(2.2, "E2M1", dtype="int8") == 4
    assert encode_steps(np.empty((0, 3), np.float32), "E2M1").shape == (0, 3)


@on_backends
def test_nan_is_refused():
    x = torch.zeros(100)
    x[57] = math.nan
    for array in (x, x.numpy()):
        with pytest.raises(ValueError, match="x contains NaN, which is no number of steps"):
            encode_steps(array, "E2M1")


@pytest.mark.parametrize(
    ("fmt", "dtype", "message"),
    [
        ("E4M0U", "uint8", "fmt must have at most 255 steps in uint8, and E4M0U has 16384"),
        ("E4M3", "uint8", "at most 127 steps in uint8, and E4M3"),
        ("E3M1U", "int8", "at most 127 steps in int8, and E3M1U has 192"),
        ("E2M1", "int16", "dtype must be 'uint8' or 'int8', not 'int16'"),
    ],
)
def test_what_does_not_fit_is_refused(fmt, dtype, message):
    with pytest.raises(ValueError, match=message):
        encode_steps(1.0, fmt, dtype=dtype)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_counting_gives_the_same_numbers():
    x = torch.randn(64, 33)
    for name in ("E2M1", "E2M2U"):
        expected = encode_steps(x, name, 0.3)
        compiled = torch.compile(encode_steps, fullgraph=True)(x, name, 0.3)
        assert torch.equal(compiled, expected)


@pytest.mark.slow
@pytest.mark.parametrize("power", range(16))
def test_division_by_one_scale_has_the_bits_of_the_division(power):
    """E0M8U has 510 ties and thresholds, at which a quotient that is one ulp off would be seen."""
    fmt = parse("E0M8U")
    generator = np.random.default_rng(power)
    scale = np.float32(2.0 ** generator.uniform(-20, 20))
    mantissas = np.arange(1 << 23, dtype=np.uint32)
    for exponent in (126, 127):  # of numbers from 0.5 to 2, times the scale
        x = (mantissas | np.uint32(exponent << 23)).view(np.float32) * scale
        assert np.array_equal(encode_steps(x, fmt, scale), encode_steps(x / scale, fmt))


@on_backends
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(2.0**-59, 2.0**59, width=32).map(np.float32),
    shift=st.none() | st.floats(-8, 8, width=32).map(np.float32),
)
def test_quotients_near_ties_are_rounded_as_those_of_the_division(seed, scale, shift):
    fmt = parse("E2M1")
    generator = np.random.default_rng(seed)
    ties = generator.choice(np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]), 64)
    x = np.nextafter(
        np.float32(ties) * scale, generator.choice([-np.inf, np.inf], 64).astype(np.float32)
    )
    x = np.concatenate([x, np.float32(ties) * scale, np.float32([0.0, -0.0, np.inf, -np.inf])])
    x = x * generator.choice(np.float32([-1, 1]), len(x))
    zero = None if shift is None else shift * scale
    x = x if zero is None else x + zero
    with np.errstate(over="ignore", invalid="ignore"):
        v = (x if zero is None else x - zero) / scale
    assert np.array_equal(encode_steps(x, fmt, scale, zero), encode_steps(v, fmt))
    assert np.array_equal(encode_scaled(x, fmt, scale, zero), encode_scaled(v, fmt, np.float32(1)))


@on_backends
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shift", [None, -0.7], ids=["", "shifted"])
@pytest.mark.parametrize("fmt", [parse("E2M1"), parse("E2M2U"), parse("E3M0")], ids=str)
def test_a_prepared_encoder_gives_the_same_steps(fmt, shift, dtype):
    encoder = StepEncoder(fmt, 0.3, shift)
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    for laid_out in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2], x[:0]):
        given = laid_out.to(getattr(torch, dtype))
        expected = encode_steps(given, fmt, 0.3, shift)
        for each in (encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):  # noqa: S301
            found = each(given)
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()
    if dtype != "bfloat16":
        array = x.numpy().astype(dtype)
        assert np.array_equal(encoder(array), encode_steps(array, fmt, 0.3, shift))
    assert encoder(1.0) == encode_steps(1.0, fmt, 0.3, shift)


@on_backends
def test_a_prepared_encoder_refuses_what_cannot_be_counted():
    encoder = StepEncoder("E2M1", 0.3)
    for x in (np.array([1.0, math.nan]), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="x contains NaN, which is no number of steps"):
            encoder(x)
    with pytest.raises(TypeError, match="x is of type int; write float"):
        encoder(1)
    with pytest.raises(ValueError, match=r"scale is -1\.0; it must be positive and finite"):
        StepEncoder("E2M1", -1)
    with pytest.raises(ValueError, match="zero_point is inf; it must be finite"):
        StepEncoder("E2M1", 1, math.inf)
    with pytest.raises(ValueError, match="E4M0U has 16384"):
        StepEncoder("E4M0U", 1)


@pytest.mark.slow
def test_a_prepared_encoder_can_be_compiled():
    x, encoder = torch.linspace(-3, 3, 100), StepEncoder("E2M2U", 0.3, -0.7)
    assert torch.equal(torch.compile(encoder, fullgraph=True)(x), encoder(x))


@pytest.mark.slow
def test_channels_last_can_be_compiled():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last)
    for name in ("E2M1", "E2M2U", "E3M0"):
        compiled = torch.compile(encode_steps, fullgraph=True, dynamic=False)
        assert torch.equal(compiled(x, name, 0.3), encode_steps(x, name, 0.3))
