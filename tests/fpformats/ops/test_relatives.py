"""What other libraries get wrong is right here; where they are right, they agree.

Each exception from agreement is written out: if a library mends its ways, its test here fails.
"""

import math

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from oracles import aimed_inputs, assert_same_bits, signed_boundaries

from fpformats import (
    MXFP4,
    NVFP4,
    decode,
    dtype_of,
    encode,
    encode_blocks,
    exact,
    parse,
    quantize,
    quantize_blocks,
)

E2M1, E4M3, E5M2 = parse("E2M1"), parse("E4M3"), parse("E5M2")
GFLOAT_MODES = {
    "NearestTiesToEven": gfloat.RoundMode.TiesToEven,
    "NearestTiesToAway": gfloat.RoundMode.TiesToAway,
    "TowardZero": gfloat.RoundMode.TowardZero,
    "TowardPositive": gfloat.RoundMode.TowardPositive,
    "TowardNegative": gfloat.RoundMode.TowardNegative,
}
GFLOAT_FORMATS = {
    "E4M3": gfloat.formats.format_info_ocp_e4m3,
    "E5M2": gfloat.formats.format_info_ocp_e5m2,
    "E2M1": gfloat.formats.format_info_ocp_e2m1,
    "E2M3": gfloat.formats.format_info_ocp_e2m3,
    "E3M2": gfloat.formats.format_info_ocp_e3m2,
}


class TestUnsigned:
    def test_gfloat_returns_negatives_from_unsigned_formats(self):
        unsigned = gfloat.formats.format_info_p3109(8, 3, gfloat.types.Signedness.Unsigned)
        assert gfloat.round_float(unsigned, -4.0) == -4.0
        fmt = parse("E2M1U")
        assert quantize(-3.0, fmt) == 0
        assert math.isnan(quantize(-3.0, fmt, saturation="SatNone"))
        assert encode(-3.0, fmt) == 0

    def test_torch_drops_the_sign_of_what_becomes_a_block_scale(self):
        theirs = torch.tensor([-4.0]).to(torch.float8_e8m0fnu).float()
        assert theirs.item() == 4
        assert quantize(-4.0, parse("E8M0")) == 2.0**-127
        assert math.isnan(quantize(-4.0, parse("E8M0"), saturation="SatNone"))


class TestDoubleRounding:
    X = 1 + 2**-4 + 2**-45

    def test_torch_rounds_twice_from_float64(self):
        # So does ml_dtypes before version 0.7.
        assert float(np.float64(self.X).astype(ml_dtypes.float8_e4m3fn)) in (1, 1.125)
        assert torch.tensor(self.X, dtype=torch.float64).to(torch.float8_e4m3fn).double() == 1
        assert quantize(self.X, E4M3) == 1.125
        assert quantize(torch.tensor(self.X, dtype=torch.float64), E4M3).item() == 1.125
        assert encode(np.float64(self.X), E4M3) == 0x39


class TestLogarithms:
    def test_just_below_a_power_of_two(self):
        x = np.float32(8 - 2**-21)
        assert np.floor(np.log2(np.float32(8) - np.float32(2**-21) / 4)) == 3  # the trap
        assert quantize(x, E2M1, rounding="TowardZero") == 6
        block = np.full(32, np.float32(8 - 2**-21))
        assert encode_blocks(block, MXFP4).scales.tolist() == [127]


class TestTies:
    @pytest.mark.parametrize("name", ["E2M1", "E4M0U", "E3M0", "E8M0", "Binary8p1se"])
    def test_go_to_the_even_code_at_every_precision(self, name):
        fmt = parse(name)
        for code in range(fmt.smallest_code, min(fmt.max_code, 250)):
            tie = (exact.decode(code, fmt) + exact.decode(code + 1, fmt)) / 2
            assert encode(float(tie), fmt) == code + code % 2

    def test_block_scales_of_ml_dtypes_always_tie_up(self):
        ties = np.array([1.5, 3.0, 6.0, 12.0], np.float32)
        assert (ties.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32) > ties).all()
        assert encode(ties, parse("E8M0")).tolist() == [128, 128, 130, 130]

    def test_subnormal_ties_are_rounded_once(self):
        assert quantize(np.float32(0.25 - 2**-26), E2M1) == 0

    def test_ties_away_are_away_for_negatives_too(self):
        away = quantize(np.array([-2.5, 2.5, -0.25]), E2M1, rounding="NearestTiesToAway")
        assert away.tolist() == [-3, 3, -0.5]


class TestNearest:
    def test_every_bit_below_the_last_counts(self):
        assert quantize(1.27, E2M1) == 1.5
        assert quantize(8.0, E2M1) == 6


class TestOverflow:
    def test_ends_at_the_largest_value(self):
        assert quantize(65536.0, E5M2) == 57344
        assert quantize(65536.0, E5M2, saturation="SatNone") == math.inf
        assert quantize(131008.0, parse("FP16")) == 65504
        assert quantize(480.0, E4M3) == 448
        assert math.isnan(quantize(480.0, E4M3, saturation="OverflowNaN"))


class TestNan:
    def test_some_libraries_turn_nan_into_a_number(self):
        assert np.array([math.nan], np.float32).astype(ml_dtypes.float4_e2m1fn).astype(float) == 0

    @pytest.mark.parametrize("rounding", ["NearestTiesToEven", "TowardZero", "ToOdd"])
    def test_it_stays_nan_or_is_an_error(self, rounding):
        assert math.isnan(quantize(math.nan, E2M1, rounding=rounding))
        with pytest.raises(ValueError, match="x contains NaN"):
            encode(math.nan, E2M1, rounding=rounding)


class TestToOdd:
    def test_exact_values_stay(self):
        listed = E4M3.values()
        np.testing.assert_array_equal(quantize(listed, E4M3, rounding="ToOdd"), listed)


class TestStochastic:
    def test_the_seed_decides_and_both_neighbours_come_up(self):
        x = np.full(1000, 1.2)
        first = quantize(x, E2M1, rounding="StochasticA", random=1)
        np.testing.assert_array_equal(first, quantize(x, E2M1, rounding="StochasticA", random=1))
        assert (first != quantize(x, E2M1, rounding="StochasticA", random=2)).any()
        assert sorted(set(first.tolist())) == [1, 1.5]


class TestScales:
    def test_subnormal_scales_are_used(self):
        x = np.zeros(32, np.float32)
        x[0], x[16] = 6 * 448, 6 * 2**-9
        assert encode_blocks(x, NVFP4).scales.tolist() == [0x7E, 0x01]
        np.testing.assert_array_equal(quantize_blocks(x, NVFP4), x)


@pytest.mark.parametrize(
    "dtype",
    [
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e3m4", "float8_e4m3fnuz"),
        *("float8_e5m2fnuz", "float8_e4m3b11fnuz", "bfloat16"),
    ],
)
def test_ml_dtypes_agrees_beyond_the_range_too(dtype):
    # From float32: it overflows to infinity, or NaN without one. FNUZ formats have no -0 in
    # either. Not so float4 and float6, which saturate and lose NaN, nor float64 inputs.
    fmt = parse(dtype)
    if fmt.bits == 8:
        x = aimed_inputs(fmt, "float32")
    else:
        x = (np.arange(2**16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    with np.errstate(invalid="ignore"):
        theirs = x.astype(dtype_of(fmt, "ml_dtypes")).astype(np.float32)
    assert_same_bits(quantize(x, fmt, saturation="OverflowNaN"), theirs)


@pytest.mark.parametrize("dtype", ["float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"])
def test_ml_dtypes_saturates_its_formats_without_nan(dtype):
    fmt = parse(dtype)
    x = aimed_inputs(fmt, "float32")
    x = x[~np.isnan(x)]
    theirs = x.astype(dtype_of(fmt, "ml_dtypes")).astype(np.float32)
    assert_same_bits(quantize(x, fmt), theirs)


def test_ml_dtypes_agrees_on_block_scales_but_for_ties_zero_and_negatives():
    fmt = parse("E8M0")
    x = aimed_inputs(fmt, "float32")
    x = x[(x >= 2.0**-126) & (x <= 2.0**127)]
    x = x[np.frexp(x)[0] != 0.75]
    assert_same_bits(quantize(x, fmt), x.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "bfloat16"])
def test_torch_agrees_from_float32_in_range(dtype):
    # Not beyond the range, where it has changed between versions.
    fmt = parse(dtype)
    x = aimed_inputs(parse("E5M2"), "float32")
    x = torch.from_numpy(x[np.abs(x) <= fmt.max])
    theirs = x.to(getattr(torch, dtype)).float()
    assert_same_bits(quantize(x, fmt).numpy(), theirs.numpy())
    codes = np.arange(fmt.code_count, dtype=f"uint{fmt.bits}")
    tensor = torch.from_numpy(codes.view(f"int{fmt.bits}")).view(getattr(torch, dtype)).float()
    assert_same_bits(decode(codes, fmt), tensor.numpy())


@pytest.mark.parametrize("mode", GFLOAT_MODES)
@pytest.mark.parametrize("name", GFLOAT_FORMATS)
def test_gfloat_agrees_on_directed_modes(name, mode):
    # Not on ties away just below half the smallest value, where it adds 1/2 and rounds on the way.
    fmt, x = parse(name), signed_boundaries(parse(name), "float64")[0]
    if mode == "NearestTiesToAway":
        below_half = np.nextafter(fmt.smallest / 2, 0)
        away = gfloat.round_float(GFLOAT_FORMATS[name], below_half, GFLOAT_MODES[mode])
        assert away == fmt.smallest
        assert quantize(below_half, fmt, rounding=mode) == 0
        x = x[np.abs(x) != below_half]
    expected = [
        gfloat.round_float(GFLOAT_FORMATS[name], float(v), GFLOAT_MODES[mode], sat=True) for v in x
    ]
    assert_same_bits(quantize(x, fmt, rounding=mode), np.array(expected))


@pytest.mark.parametrize("precision", range(1, 8))
def test_gfloat_decodes_signed_extended_formats_of_p3109_alike(precision):
    fmt = parse(f"Binary8p{precision}se")
    theirs = gfloat.formats.format_info_p3109(8, precision)
    decoded = [gfloat.decode_float(theirs, code).fval for code in range(256)]
    assert_same_bits(decode(np.arange(256), fmt, dtype="float64"), np.array(decoded))


def test_numpy_half_overflows_to_infinity_as_without_saturation():
    x = np.array([65519.99, 65520.0, -65520.0, 1e9, math.inf])
    with np.errstate(over="ignore"):
        theirs = x.astype(np.float16).astype(np.float64)
    assert_same_bits(quantize(x, parse("FP16"), saturation="SatNone"), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("exponent", "mantissa"), [(5, 2), (4, 3), (5, 10), (8, 7), (6, 9)])
def test_qtorch_agrees_on_normal_numbers_away_from_ties(exponent, mantissa):
    # It compiles at first use. Ties go away from zero, subnormals are rounded twice, and the
    # exponent of infinities holds numbers: all three are left out.
    from qtorch.quant import float_quantize

    fmt = parse(f"E{exponent}M{mantissa}IEEE")
    generator = np.random.default_rng(0)
    x = generator.standard_normal(100_000) * 2.0 ** generator.integers(-9, 9, 100_000)
    x = x.astype(np.float32)
    x = x[(np.abs(x) >= fmt.smallest_normal) & (np.abs(x) < fmt.max)]
    up = quantize(x, fmt, rounding="NearestTiesToAway")
    x = x[up == quantize(x, fmt)]
    theirs = float_quantize(torch.from_numpy(x), exponent, mantissa, rounding="nearest")
    assert_same_bits(quantize(x, fmt), theirs.numpy())
    tie = np.float32(1 + 2.0 ** -(mantissa + 1))
    away = float_quantize(torch.tensor([tie]), exponent, mantissa, rounding="nearest")
    assert away.item() == 1 + 2.0**-mantissa
    assert quantize(tie, fmt) == 1
