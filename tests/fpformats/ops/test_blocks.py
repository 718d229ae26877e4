import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracles import assert_same_bits

from fpformats import decode, exact, pack, parse, quantize
from fpformats.ops.block_formats import (
    MXFP4,
    MXFP8_E4M3,
    MXINT8,
    NVFP4,
    NVFP4_INT4,
    PRESETS,
    BlockFormat,
    ScaleRule,
)
from fpformats.ops.blocks import decode_blocks, encode_blocks, quantize_blocks

on_backends = pytest.mark.usefixtures("backend")

UNSIGNED = BlockFormat(parse("E2M1U"), parse("UE5M3"), 5, ScaleRule.Max)
MIXED_SIGN = BlockFormat(
    parse("E2M1"), parse("E4M3"), 8, ScaleRule.Max, tensor_scale=True, alternative=parse("E2M2U")
)


def block_scale(block, fmt, tensor_scale):
    """The scale of a list of floats, by the definition in rationals."""
    magnitudes = [abs(Fraction(v)) if fmt.element.signed else max(Fraction(v), 0) for v in block]
    largest = max(magnitudes)
    reach = Fraction(2) ** fmt.element.max_exponent
    if fmt.rule in (ScaleRule.RCeil, ScaleRule.Max):
        reach = fmt.element.exact_max
    rounding = {
        "Floor": "TowardZero",
        "Ceil": "TowardPositive",
        "Nearest": "NearestTiesToEven",
        "RCeil": "TowardPositive",
        "Max": "NearestTiesToEven",
    }[fmt.rule]
    return float(exact.quantize(largest / reach / tensor_scale, fmt.scale, rounding))


def block_by_definition(block, fmt, tensor_scale):
    """A block of float32 rounded, and its squared error."""
    scale = block_scale(block.tolist(), fmt, Fraction(float(tensor_scale)))
    total = np.float32(scale) * tensor_scale
    v = block / (total if total else np.float32(math.inf))
    q = [float(exact.quantize(float(number), fmt.element)) for number in v]
    rounded = np.array(q, dtype=np.float32) * total
    errors = ((rounded.astype(float) - block) ** 2).tolist()
    errors += [0.0] * (2 ** math.ceil(math.log2(fmt.size)) - len(errors))
    while len(errors) > 1:
        half = len(errors) // 2
        errors = [a + b for a, b in zip(errors[:half], errors[half:], strict=True)]
    return rounded, errors[0]


def by_definition(x, fmt):
    """Rows of float32 along the last axis, block by block."""
    tensor_scale = np.float32(1)
    if fmt.tensor_scale and np.abs(x).max() > 0:
        reach = min(choice.element.max for choice in fmt.choices)
        tensor_scale = np.float32(np.float64(np.abs(x).max()) / (reach * fmt.scale.max))
    result = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        for start in range(0, x.shape[-1], fmt.size):
            place = (*index, slice(start, start + fmt.size))
            found = [block_by_definition(x[place], each, tensor_scale) for each in fmt.choices]
            result[place] = min(found, key=lambda pair: pair[1])[0]
    return result


def random_blocks(shape, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(shape) * 2.0 ** generator.integers(-12, 12, shape)
    x[..., :3] = 0
    return x.astype(np.float32)


@on_backends
@pytest.mark.parametrize("rule", ScaleRule)
@pytest.mark.parametrize(
    "fmt", [*PRESETS.values(), UNSIGNED, MIXED_SIGN], ids=[*PRESETS, "unsigned", "mixed sign"]
)
def test_blocks_are_as_defined(fmt, rule):
    fmt = replace(fmt, rule=rule)
    x = random_blocks((3, 2 * fmt.size + 7))
    expected = by_definition(x, fmt)
    for array in (x, torch.from_numpy(x)):
        assert_same_bits(quantize_blocks(array, fmt), expected)
        blocks = encode_blocks(array, fmt)
        assert tuple(blocks.codes.shape) == x.shape
        assert tuple(blocks.scales.shape) == (3, -(-x.shape[1] // fmt.size))
        np.testing.assert_array_equal(decode_blocks(blocks, fmt), expected)


@on_backends
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("name", ["MXFP4", "NVFP4", "MXINT8"])
def test_blocks_lie_along_any_axis(name, axis):
    fmt, x = PRESETS[name], random_blocks((5, 40, 33), seed=1)
    expected = np.moveaxis(quantize_blocks(np.moveaxis(x, axis, -1), fmt), -1, axis)
    assert_same_bits(quantize_blocks(x, fmt, axis=axis), expected)
    tensor = torch.from_numpy(x)
    assert_same_bits(quantize_blocks(tensor, fmt, axis=axis), expected)
    blocks = encode_blocks(tensor, fmt, axis=axis)
    np.testing.assert_array_equal(decode_blocks(blocks, fmt, axis=axis), expected)


@on_backends
def test_a_block_just_below_a_power_of_two_keeps_its_scale():
    # float32 log2 gives 3 for 8 - 2**-21, and so a scale twice too large.
    x = np.full(32, 8 - 2**-21, dtype=np.float32)
    assert encode_blocks(x, MXFP4).scales.tolist() == [127]
    assert (quantize_blocks(x, MXFP4) == 6).all()


@on_backends
def test_scales_that_are_subnormal_are_used():
    x = np.zeros(32, dtype=np.float32)
    x[0], x[16:] = 6 * 448, 6 * 2**-8
    blocks = encode_blocks(x, NVFP4)
    assert float(blocks.tensor_scale) == 1
    assert blocks.scales.tolist() == [0x7E, 0x02]  # 448, and the subnormal 2**-8
    assert_same_bits(decode_blocks(blocks, NVFP4), x)
    tiny = np.full(32, 2.0**-126, dtype=np.float32)
    assert encode_blocks(tiny, MXFP8_E4M3).scales.tolist() == [0]  # 2**-127, subnormal in float32
    assert_same_bits(quantize_blocks(tiny, MXFP8_E4M3), tiny)


@on_backends
def test_integers_are_twos_complement():
    x = np.array([1.0, -1.0, 127 / 64, -127 / 64, 0.0, -1 / 64], dtype=np.float32)
    blocks = encode_blocks(x, MXINT8)
    assert blocks.codes.tolist() == [64, 192, 127, 129, 0, 255]
    assert blocks.codes.astype(np.int8).tolist() == [64, -64, 127, -127, 0, -1]
    assert blocks.scales.tolist() == [127]
    assert decode_blocks(blocks, MXINT8).tolist() == x.tolist()
    lowest = blocks._replace(codes=np.array([128], np.uint8))
    assert decode_blocks(lowest, MXINT8).tolist() == [-2.0]


@on_backends
@pytest.mark.parametrize("name", PRESETS)
def test_zeros_nan_and_infinity(name):
    fmt = PRESETS[name]
    zeros = np.zeros(2 * fmt.size, np.float32)
    assert (quantize_blocks(zeros, fmt) == 0).all()
    assert encode_blocks(np.zeros((2, 0), np.float32), fmt).codes.shape == (2, 0)
    x = zeros + 1
    x[0] = math.nan
    ones = quantize_blocks(zeros + 1, fmt)
    for array in (x, torch.from_numpy(x)):
        decoded = np.asarray(decode_blocks(encode_blocks(array, fmt), fmt))
        assert np.isnan(decoded[: fmt.size]).all()
        assert (decoded[fmt.size :] == ones[fmt.size :]).all()
    x[0] = math.inf
    assert not np.isnan(quantize_blocks(x, fmt)).any()


@on_backends
def test_nan_without_a_code_anywhere_is_refused():
    fmt = BlockFormat(parse("E2M1"), parse("E4M3U"), 16)
    with pytest.raises(ValueError, match="x contains NaN, which the scales' format E4M3U"):
        encode_blocks(np.full(16, math.nan), fmt)


def test_what_blocks_cannot_do_is_refused():
    x = np.ones(32, np.float32)
    for function, words in (
        (quantize_blocks, {"packed": True}), (quantize_blocks, {"clip_gradient": True}),
        (quantize_blocks, {"nan": 0}), (encode_blocks, {"out": x}), (encode_blocks, {"nan": 0}),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="unexpected keyword"):
            function(x, MXFP4, **words)
    for call in (
        lambda: encode_blocks(x, parse("E2M1")),
        lambda: BlockFormat(4, parse("E8M0"), 32),
    ):
        with pytest.raises(TypeError, match=r"E2M1: 4 bits|element is 4; it must be a FloatFormat"):
            call()
    with pytest.raises(ValueError, match="fmt is 'E2M1'; block formats are"):
        quantize_blocks(x, "E2M1")
    assert BlockFormat("E2M1", "E8M0", 32) == MXFP4
    with pytest.raises(ValueError, match="there is one, and the format has none"):
        decode_blocks(encode_blocks(x[:16], NVFP4), MXFP4)
    with pytest.raises(ValueError, match="there is none, and the format has one"):
        decode_blocks(encode_blocks(x[:16], MXFP4), NVFP4)
    with pytest.raises(TypeError, match="bfloat16, which NumPy does not have"):
        decode_blocks(encode_blocks(x, MXFP4), MXFP4, dtype="bfloat16")


@on_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = quantize_blocks(x, MXFP4)
    assert q.dtype == dtype
    wide = quantize_blocks(x.double(), MXFP4)
    assert torch.equal(q.double(), wide)
    assert decode_blocks(encode_blocks(x, MXFP4), MXFP4, dtype=dtype).dtype == dtype


@on_backends
def test_policies_reach_the_elements():
    x = np.full(32, 1.1, np.float32)
    x[0] = 4.0
    assert (quantize_blocks(x, MXFP4, rounding="TowardPositive")[1:] == 1.5).all()
    drawn = quantize_blocks(x, MXFP4, rounding="StochasticA", random=1)
    assert_same_bits(drawn, quantize(x, MXFP4.element, rounding="StochasticA", random=1))


@on_backends
def test_the_gradient_passes_straight_through():
    x = torch.randn(64, requires_grad=True)
    (quantize_blocks(x, NVFP4) * torch.arange(64)).sum().backward()
    assert torch.equal(x.grad, torch.arange(64.0))


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4_INT4], ids=["MXFP4", "NVFP4_INT4"])
def test_blocks_compile(fmt):
    x = torch.randn(3, 40)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quantize_blocks(x, fmt), fullgraph=True)(x)
    assert torch.equal(compiled, quantize_blocks(x, fmt))


def test_the_sign_of_a_scale_chooses_integers_for_its_block():
    x = np.concatenate([np.arange(-8, 8), [0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2]).astype(np.float32)
    x[0] = 7
    for kind in (np.asarray, torch.from_numpy):
        blocks = encode_blocks(kind(x), NVFP4_INT4, tensor_scale=1.0)
        assert blocks.scales.tolist() == [0x80 | 0x38, 0x38]  # both scales are 1
        assert blocks.codes[:4].tolist() == [7, 15, 14, 13]
        assert_same_bits(np.asarray(decode_blocks(blocks, NVFP4_INT4)), x)
        assert_same_bits(np.asarray(quantize_blocks(kind(x), NVFP4_INT4, tensor_scale=1.0)), x)


def test_equally_good_formats_leave_the_scale_positive():
    for x in (np.zeros(16, np.float32), -np.zeros(16, np.float32), np.full(16, np.nan, np.float32)):
        for kind in (np.asarray, torch.from_numpy):
            assert (np.asarray(encode_blocks(kind(x), NVFP4_INT4).scales) < 0x80).all()


def test_a_second_format_never_has_more_error():
    x = random_blocks((50, 64), seed=2).astype(np.float64)
    errors = [
        ((quantize_blocks(x, fmt) - x) ** 2).reshape(50, 4, 16).sum(-1)
        for fmt in (NVFP4, NVFP4_INT4)
    ]
    assert (errors[1] <= errors[0]).all()
    assert (errors[1] < errors[0]).any()


def test_codes_out_of_range_of_a_signed_scale_are_refused():
    blocks = encode_blocks(np.ones(16, np.float32), NVFP4_INT4)
    for code in (-1, 256):
        wrong = blocks._replace(scales=np.array([code]))
        with pytest.raises(ValueError, match=f"{code}.*E4M3"):
            decode_blocks(wrong, NVFP4_INT4)


def test_a_policy_concerns_the_format_that_a_block_has():
    x = np.zeros(16, np.float32)
    x[:8] = np.arange(8)  # 7 is above the largest E2M1, and the block has integers
    blocks = encode_blocks(x, NVFP4_INT4, tensor_scale=1.0, saturation="OverflowNaN")
    assert_same_bits(decode_blocks(blocks, NVFP4_INT4), x)


def test_nan_that_saturation_makes_is_refused():
    x = np.array([7.9] + [0.0] * 31, np.float32)
    for kind in (np.asarray, torch.from_numpy):
        with pytest.raises(ValueError, match="NaN"):
            encode_blocks(kind(x), MXFP4, saturation="OverflowNaN")


def test_a_negative_zero_has_the_same_scale_in_both_libraries():
    fmt = BlockFormat(parse("E2M1U"), parse("E4M3"), 16, ScaleRule.Max)
    x = np.array([-0.0], np.float32)
    assert encode_blocks(x, fmt).scales.tolist() == [0]
    assert encode_blocks(torch.from_numpy(x), fmt).scales.tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size is 0; it must be a positive integer"),
        ({"size": True}, "size is True"),
        ({"rule": "Up"}, "rule is 'Up'; allowed: Floor, Ceil, Nearest, RCeil, Max"),
        ({"twos_complement": True}, "element is E2M1; two's complement is for signed E0My"),
        ({"alternative": "E2M2"}, "alternative is E2M2 of 5 bits; element E2M1 has 4"),
        ({"alternative": "E0M3"}, "alternative is E0M3; with the unsigned scale E8M0"),
        (
            {"element": "E0M3", "twos_complement": True, "alternative": "E2M1"},
            "alternative is E2M1; with two's complement",
        ),
    ],
)
def test_impossible_compositions_are_refused(arguments, message):
    options = {"element": parse("E2M1"), "scale": parse("E8M0"), "size": 32} | arguments
    with pytest.raises(ValueError, match=message):
        BlockFormat(**options)


@on_backends
@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy], ids=["NumPy", "torch"])
@pytest.mark.parametrize("name", PRESETS)
def test_results_go_where_they_are_wanted(name, wrap):
    x = wrap(np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32))
    expected = quantize_blocks(x, name)
    assert_same_bits(np.asarray(quantize_blocks(x, PRESETS[name])), np.asarray(expected))
    blocks, out = encode_blocks(x, name), wrap(np.zeros((3, 40), np.float32))
    assert decode_blocks(blocks, name, out=out) is out
    # Integers in two's complement have one zero.
    unsigned_zero = 0.0 if PRESETS[name].twos_complement else -0.0
    assert_same_bits(np.asarray(out), np.asarray(expected) + unsigned_zero)
    assert quantize_blocks(x, name, out=x) is x
    assert_same_bits(np.asarray(x), np.asarray(expected))


@on_backends
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", PRESETS)
def test_packed_codes_of_blocks_come_back(name, axis):
    x = np.random.default_rng(0).standard_normal((7, 40)).astype(np.float32)
    plain = encode_blocks(x, name, axis=axis)
    blocks = encode_blocks(x, name, axis=axis, packed=True)
    np.testing.assert_array_equal(blocks.codes, pack(plain.codes, PRESETS[name].element.bits))
    np.testing.assert_array_equal(blocks.scales, plain.scales)
    values = decode_blocks(blocks, name, axis=axis, shape=x.shape)
    assert_same_bits(values, decode_blocks(plain, name, axis=axis))


@on_backends
def test_results_of_blocks_are_not_put_where_they_do_not_fit():
    x = torch.ones(2, 32)
    with pytest.raises(TypeError, match=r"out is Tensor of torch\.float64; x is Tensor"):
        quantize_blocks(x, MXFP4, out=x.double())
    with pytest.raises(ValueError, match="an input requires a gradient"):
        quantize_blocks(x.clone().requires_grad_(), MXFP4, out=x)
    blocks = encode_blocks(x, MXFP4)
    with pytest.raises(ValueError, match=r"out has shape \(2, 31\); the result has"):
        decode_blocks(blocks, MXFP4, out=torch.ones(2, 31))
    with pytest.raises(TypeError, match="packed is of type int64"):
        decode_blocks(blocks._replace(codes=blocks.codes.long()), MXFP4, shape=(2, 32))


def test_bad_input_is_refused():
    x = np.ones((2, 32))
    with pytest.raises(TypeError, match="x is a float"):
        encode_blocks(1.0, MXFP4)
    with pytest.raises(TypeError, match="x has dtype int64"):
        encode_blocks(np.ones(3, np.int64), MXFP4)
    with pytest.raises(ValueError, match="fmt is 'NVFP5'; block formats are MXFP8_E4M3, "):
        encode_blocks(x, "NVFP5")
    with pytest.raises(TypeError, match="fmt is 4; it must be a BlockFormat, such as MXFP4, or a"):
        encode_blocks(x, 4)
    for axis in (2, -3, 1.0):
        with pytest.raises(ValueError, match=r"axis is .*; x has 2 dimensions"):
            quantize_blocks(x, MXFP4, axis=axis)
    blocks = encode_blocks(x, MXFP4)
    with pytest.raises(ValueError, match=r"blocks.scales has shape .*; the codes need \(2, 1\)"):
        decode_blocks(blocks._replace(scales=blocks.scales[:1]), MXFP4)
    with pytest.raises(ValueError, match="float32 cannot hold"):
        decode_blocks(blocks, BlockFormat(parse("FP64"), parse("E8M0"), 32), dtype="float16")


GIVEN = [MXFP4, MXFP8_E4M3, MXINT8, NVFP4, UNSIGNED]


@on_backends
@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize("fmt", GIVEN, ids=lambda fmt: f"{fmt.element} {fmt.scale}")
def test_given_scales_are_used_as_defined(fmt, as_torch):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 40)).astype(np.float32)
    shape = (3, -(-40 // fmt.size))
    middle = int(
        encode_blocks(
            np.ones((1, fmt.size), np.float32), fmt, tensor_scale=1.0 if fmt.tensor_scale else None
        ).scales[0, 0]
    )
    codes = generator.integers(middle - 2, middle + 3, shape).astype(np.uint8)
    whole = np.float32(0.7) if fmt.tensor_scale else None
    scale = decode(codes, fmt.scale) * (np.float32(1) if whole is None else whole)
    spread = np.repeat(scale, fmt.size, axis=1)[:, :40]
    values = [[float(exact.quantize(float(v), fmt.element)) for v in row] for row in x / spread]
    expected = np.array(values, np.float32) * spread
    data, given = x, codes
    if as_torch:
        data, given = torch.from_numpy(x), torch.from_numpy(codes)
    rounded = quantize_blocks(data, fmt, scales=given, tensor_scale=whole)
    blocks = encode_blocks(data, fmt, scales=given, tensor_scale=whole)
    assert np.array_equal(np.asarray(rounded), expected)
    assert np.array_equal(np.asarray(decode_blocks(blocks, fmt)), expected)
    assert np.array_equal(np.asarray(blocks.scales), codes)


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4])
def test_the_scales_of_an_encoding_give_the_same_encoding(fmt):
    x = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    blocks = encode_blocks(x, fmt)
    again = encode_blocks(x, fmt, scales=blocks.scales, tensor_scale=blocks.tensor_scale)
    assert np.array_equal(blocks.codes, again.codes)


def test_each_row_may_have_a_scale_of_its_own():
    x = np.random.default_rng(2).standard_normal((3, 40)).astype(np.float32)
    whole = np.array([[1e-3], [2e-3], [3e-3]], np.float32)
    together = quantize_blocks(x, NVFP4, tensor_scale=whole)
    for row, scale in zip(range(3), whole[:, 0], strict=True):
        alone = quantize_blocks(x[row], NVFP4, tensor_scale=float(scale))
        assert np.array_equal(together[row], alone)


def test_a_tensor_scale_of_another_tensor_saturates_and_stays_finite():
    x = np.array([1.0, 1e6], np.float32)
    assert (
        quantize_blocks(x, NVFP4, tensor_scale=1e-3).max() == np.float32(448) * np.float32(1e-3) * 6
    )


ONES = np.ones((2, 32), np.float32)
REFUSED = {
    "shape": ({"scales": np.ones((2, 3), np.uint8), "tensor_scale": 1.0}, "scales has shape"),
    "no tensor scale": ({"scales": np.ones((2, 2), np.uint8)}, "tensor_scale is None"),
    "negative": ({"tensor_scale": -1.0}, "tensor_scale must be positive and finite"),
    "nan": ({"tensor_scale": math.nan}, "tensor_scale must be positive and finite"),
    "broadcast": ({"tensor_scale": np.ones((3, 1), np.float32)}, "does not broadcast"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [encode_blocks, quantize_blocks])
def test_given_scales_that_do_not_suit_are_refused(function, name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        function(ONES, NVFP4, **options)


@pytest.mark.parametrize("function", [encode_blocks, quantize_blocks])
def test_given_scales_of_other_kinds_are_refused(function):
    with pytest.raises(ValueError, match="it must be None"):
        function(ONES, MXFP4, tensor_scale=1.0)
    with pytest.raises(TypeError, match="scales is a Tensor"):
        function(ONES, MXFP4, scales=torch.ones(2, 1, dtype=torch.uint8))
    with pytest.raises(TypeError, match="integer"):
        function(ONES, MXFP4, scales=np.ones((2, 1), np.float32))
    with pytest.raises(TypeError, match="tensor_scale is a Tensor"):
        function(ONES, NVFP4, tensor_scale=torch.ones(()))


def test_nan_with_given_scales_is_refused_or_stays_nan():
    x = np.array([1.0, math.nan], np.float32)
    scales = np.full(1, 127, np.uint8)
    assert np.isnan(quantize_blocks(x, MXFP4, scales=scales)).tolist() == [False, True]
    with pytest.raises(ValueError, match="NaN"):
        encode_blocks(x, MXFP4, scales=scales)
