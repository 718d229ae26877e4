"""The scales that a search finds for blocks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpformats import BlockFormat, decode, decode_blocks, encode_blocks, parse, search_blocks
from fpformats.ops.block_formats import MXFP4, NVFP4, PRESETS

FORMATS = {**PRESETS, "unsigned": BlockFormat(parse("E2M1U"), parse("UE5M3"), 5, "Max")}


def data(seed, shape=(4, 70), spread=4):
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal(shape) * 2.0 ** generator.uniform(-spread, spread, (shape[0], 1))
    ).astype(np.float32)


def error(x, blocks, fmt):
    difference = decode_blocks(blocks, fmt, dtype="float64") - x.astype(np.float64)
    return (difference**2).sum()


@pytest.mark.parametrize("name", FORMATS)
def test_no_other_scale_of_a_block_has_less_error(name):
    """One block at a time, against all codes from half an octave below to one above."""
    fmt = FORMATS[name]
    octave = 2**fmt.scale.mantissa_bits
    for seed in range(5):
        x = data(seed, (1, fmt.size))
        found = search_blocks(x, fmt)
        errors = {}
        for sign, choice in zip((0, 1 << fmt.scale.magnitude_bits), fmt.choices, strict=False):
            whole = found.tensor_scale
            rule = int(encode_blocks(x, choice, tensor_scale=whole).scales[0, 0])
            most = min(rule + octave, fmt.scale.max_code)
            for code in range(max(rule - octave // 2, 1), most + 1, max(1, octave // 8)):
                scales = np.full((1, 1), code | sign, found.scales.dtype)
                blocks = encode_blocks(x, fmt, scales=scales, tensor_scale=whole)
                errors[code | sign] = error(x, blocks, fmt)
        assert errors[int(found.scales[0, 0])] == min(errors.values())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 999), st.integers(1, 40))
def test_the_error_is_at_most_that_of_the_rule_and_both_libraries_agree(name, seed, length):
    fmt, x = FORMATS[name], data(seed, (3, length))
    found = search_blocks(x, fmt)
    assert error(x, found, fmt) <= error(x, encode_blocks(x, fmt), fmt)
    other = search_blocks(torch.from_numpy(x), fmt)
    for mine, theirs in zip(found, other, strict=True):
        assert mine is theirs is None or np.array_equal(mine, theirs.numpy())


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_blocks_lie_along_the_axis(axis):
    x = np.ascontiguousarray(data(0, (40, 40)))
    found = search_blocks(x, MXFP4, axis=axis)
    turned = search_blocks(np.swapaxes(x, axis, -1), MXFP4)
    assert np.array_equal(found.scales, np.swapaxes(turned.scales, axis, -1))


def test_blocks_of_zeros_stay_zero():
    found = search_blocks(np.zeros((2, 32), np.float32), NVFP4)
    assert not decode_blocks(found, NVFP4).any()


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=["NVFP4", "MXFP4"])
def test_a_tensor_scale_is_checked(fmt):
    with pytest.raises(ValueError, match="tensor_scale"):
        search_blocks(np.ones((2, 8), np.float32), fmt, tensor_scale=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_block_that_is_not_finite_has_the_scale_of_the_rule(value):
    x = data(0, (2, 64))
    x[0, 3] = value
    for kind in (np.asarray, torch.from_numpy):
        found, rule = search_blocks(kind(x), MXFP4), encode_blocks(kind(x), MXFP4)
        assert found.scales[0, 0] == rule.scales[0, 0]
        assert np.array_equal(found.codes[0, :32], rule.codes[0, :32])
        finite = search_blocks(kind(x[1:]), MXFP4)
        assert np.array_equal(found.codes[1:], finite.codes)


def test_scales_are_codes_of_the_scale_format():
    found = search_blocks(data(3), NVFP4)
    values = decode(found.scales, NVFP4.scale)
    assert (values > 0).all()
    assert (values <= NVFP4.scale.max).all()
