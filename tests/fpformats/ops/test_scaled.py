import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_same_bits

from fpformats import (
    decode_scaled,
    encode_scaled,
    exact,
    parse,
    quantize,
    quantize_scaled,
    strategies,
)

on_backends = pytest.mark.usefixtures("backend")

NAMES = ["E2M1", "E2M1U", "E4M0U", "E3M0", "E1M2", "E4M3", "E4M3FNUZ", "E0M4U"]
scales = st.floats(2.0**-20, 2.0**20, width=32).map(np.float32)
shifts = st.none() | st.floats(-100, 100, width=32).map(np.float32)


@on_backends
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), scale=scales, zero_point=shifts)
def test_the_definition_is_float32_operations_in_order(name, data, scale, zero_point):
    fmt = parse(name)
    aimed = st.lists(strategies.near_ties(fmt) | strategies.floats(), min_size=1, max_size=8)
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.array(data.draw(aimed), dtype=np.float32) * scale
        x = x[~np.isnan(x)]
        x = x if zero_point is None else x + zero_point
        v = (x if zero_point is None else x - zero_point) / scale
        q = np.array([float(exact.quantize(float(ratio), fmt)) for ratio in v], dtype=np.float32)
        expected = q * scale if zero_point is None else q * scale + zero_point
    assert_same_bits(quantize_scaled(x, fmt, scale, zero_point), expected)
    tensor = torch.from_numpy(x)
    assert_same_bits(quantize_scaled(tensor, fmt, scale, zero_point).numpy(), expected)
    for array in (x, tensor):
        codes = encode_scaled(array, fmt, scale, zero_point)
        assert_same_bits(np.asarray(decode_scaled(codes, fmt, scale, zero_point)), expected)


@on_backends
def test_the_scale_divides_and_is_not_multiplied_by_its_reciprocal():
    fmt, scale = parse("E0M8U"), np.float32(0.7)
    x = np.arange(1, 511, 2).astype(np.float32) / np.float32(256) * scale
    expected = quantize(x / scale, fmt) * scale
    assert (expected != quantize(x * (np.float32(1) / scale), fmt) * scale).any()
    assert_same_bits(quantize_scaled(x, fmt, scale), expected)
    assert_same_bits(quantize_scaled(torch.from_numpy(x), fmt, float(scale)).numpy(), expected)
    tensor_scale = torch.tensor(scale)
    assert_same_bits(quantize_scaled(torch.from_numpy(x), fmt, tensor_scale).numpy(), expected)


@on_backends
def test_float64_values_are_computed_in_float64():
    fmt = parse("E4M3")
    x = 0.3 * (1 + 2**-4 + 2**-45)
    assert quantize_scaled(x, fmt, 0.3) == 0.3 * quantize(x / 0.3, fmt)
    assert quantize_scaled(np.array([x]), fmt, 0.3)[0] == 0.3 * 1.125


@on_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_values_are_computed_in_float32(dtype):
    x, fmt = (torch.randn(1000) * 3).to(dtype), parse("E2M1")
    expected = quantize_scaled(x.float(), fmt, 0.3, 0.7).to(dtype)
    q = quantize_scaled(x, fmt, 0.3, 0.7)
    assert q.dtype == dtype
    assert torch.equal(q, expected)
    assert torch.equal(
        decode_scaled(encode_scaled(x, fmt, 0.3, 0.7), fmt, 0.3, 0.7, dtype=dtype), q
    )


@on_backends
@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (3, 1, 1), (3, 4, 5)])
def test_scales_broadcast(shape):
    fmt, generator = parse("E2M1U"), np.random.default_rng(0)
    x = generator.standard_normal((3, 4, 5)).astype(np.float32)
    scale = generator.uniform(0.1, 1, shape).astype(np.float32)
    zero_point = -generator.uniform(0, 1, shape).astype(np.float32)
    expected = quantize((x - zero_point) / scale, fmt) * scale + zero_point
    assert_same_bits(quantize_scaled(x, fmt, scale, zero_point), expected)
    tensors = [torch.tensor(array) for array in (x, scale, zero_point)]
    assert_same_bits(quantize_scaled(tensors[0], fmt, *tensors[1:]).numpy(), expected)
    codes = encode_scaled(x, fmt, scale, zero_point)
    assert_same_bits(decode_scaled(codes, fmt, scale, zero_point), expected)


@on_backends
def test_kinds_are_kept_and_out_is_written():
    fmt = parse("E2M1")
    assert isinstance(quantize_scaled(1.0, fmt, 0.75), float)
    assert type(quantize_scaled(np.float32(1), fmt, 0.75)) is np.float32
    assert type(encode_scaled(1.0, fmt, 0.75)) is int
    assert isinstance(decode_scaled(3, fmt, 0.75), float)
    assert quantize_scaled(np.array(1.0), fmt, 0.75).shape == ()
    assert decode_scaled(np.array(3), fmt, 0.75).shape == ()
    for x in (np.linspace(-3, 3, 20), torch.linspace(-3, 3, 20)):
        before, expected = x + 0, quantize_scaled(x, fmt, 0.3, 0.1)
        assert (x == before).all()
        assert quantize_scaled(x, fmt, 0.3, 0.1, out=x) is x
        assert (x == expected).all()


@on_backends
@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scales_must_be_positive_and_finite(scale):
    for x in (np.ones(2, np.float32), torch.ones(2), 1.0):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            quantize_scaled(x, parse("E2M1"), scale)
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        encode_scaled(torch.ones(2), parse("E2M1"), torch.tensor([1.0, scale]))
    with pytest.raises(ValueError, match="zero_point must be finite"):
        quantize_scaled(torch.ones(2), parse("E2M1"), 1.0, math.nan)


def test_scales_of_another_kind_width_or_shape_are_refused():
    x, fmt = np.ones((2, 3), np.float32), parse("E2M1")
    with pytest.raises(ValueError, match=r"scale has shape \(2,\), .* broadcast to \(2, 3\)"):
        quantize_scaled(x, fmt, np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"zero_point has shape \(1, 2, 3\)"):
        quantize_scaled(x, fmt, 1.0, np.ones((1, 2, 3), np.float32))
    with pytest.raises(TypeError, match="scale is of float64, but the operations are in float32"):
        quantize_scaled(x, fmt, np.ones(3))
    with pytest.raises(TypeError, match="scale is a Tensor; x is a ndarray"):
        quantize_scaled(x, fmt, torch.ones(3))
    with pytest.raises(TypeError, match="scale has dtype int64"):
        quantize_scaled(x, fmt, np.array([1, 2, 3]))
    with pytest.raises(TypeError, match="scale is a NoneType"):
        quantize_scaled(x, fmt, None)


@on_backends
def test_nan_is_kept_and_not_encoded_silently():
    fmt, x = parse("E2M1U"), torch.tensor([math.nan, 1.0])
    assert quantize_scaled(x, fmt, 0.5, 0.1)[0].isnan()
    with pytest.raises(ValueError, match="contains NaN"):
        encode_scaled(x, fmt, 0.5)
    assert encode_scaled(x, fmt, 0.5, nan=7).tolist() == [7, 4]


@on_backends
@pytest.mark.parametrize(
    ("block_size", "shape"),
    [((-1, -1), (1, 1)), ((1, -1), (6, 1)), ((1, 4), (6, 3)), ((4, 4), (2, 3)), ((-1, 1), (1, 9))],
)
def test_blocks_share_a_scale_and_a_zero_point(block_size, shape):
    fmt, generator = parse("E2M1U"), np.random.default_rng(0)
    x = generator.standard_normal((6, 9)).astype(np.float32)
    scale = generator.uniform(0.1, 1, shape).astype(np.float32)
    zero_point = -generator.uniform(0, 1, shape).astype(np.float32)
    rows, columns = (n if size == -1 else size for size, n in zip(block_size, x.shape, strict=True))
    full = [a[np.ix_(np.arange(6) // rows, np.arange(9) // columns)] for a in (scale, zero_point)]
    expected = quantize_scaled(x, fmt, *full)
    options = {"block_size": block_size}
    assert_same_bits(quantize_scaled(x, fmt, scale, zero_point, **options), expected)
    codes = encode_scaled(x, fmt, scale, zero_point, **options)
    assert_same_bits(decode_scaled(codes, fmt, scale, zero_point, **options), expected)
    tensors = [torch.from_numpy(a) for a in (x, scale, zero_point)]
    assert_same_bits(quantize_scaled(tensors[0], fmt, *tensors[1:], **options).numpy(), expected)


def test_bad_blocks_are_refused():
    fmt, x = parse("E2M1"), np.ones((6, 9), np.float32)
    for block_size in ((4,), (0, 1), (1.0, 1), (-2, 1)):
        with pytest.raises(ValueError, match=r"block_size is .*; it must hold a positive integer"):
            quantize_scaled(x, fmt, x, block_size=block_size)
    with pytest.raises(ValueError, match=r"scale has shape \(6, 9\); blocks of \(1, 4\) need"):
        quantize_scaled(x, fmt, x, block_size=(1, 4))


def test_a_number_as_scale_is_compiled_whole():
    x, fmt = torch.tensor([0.3, 1.2, 9.0]), parse("E2M1")

    def both(x):
        y = quantize_scaled(x, fmt, 0.7, 0.1)
        return y, decode_scaled(encode_scaled(x, fmt, 0.7, nan=0), fmt, 0.7)

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    assert all(torch.equal(*pair) for pair in zip(compiled(x), both(x), strict=True))
