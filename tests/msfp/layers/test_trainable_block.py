"""Layers in block formats that are refined, and the quantizer of their weights."""

import copy
import itertools

import pytest
import torch
from torch import nn

from fpformats import decode, quantize_blocks
from fpformats.ops.block_formats import PRESETS
from msfp.layers.block import BlockLayer
from msfp.layers.block_quantizer import BlockQuantizer, quantize_input_blocks
from msfp.layers.families import family_of
from msfp.layers.formats import BlockFormats
from msfp.layers.packed import dequantized

LAYERS = {
    "linear": lambda: nn.Linear(40, 12),
    "conv1d": lambda: nn.Conv1d(20, 12, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(20, 12, 3, stride=2, bias=False),
    "grouped": lambda: nn.Conv2d(36, 12, (1, 3), groups=2),
    "conv3d": lambda: nn.Conv3d(5, 4, 2),
}
FORMATS = [
    BlockFormats("NVFP4", "NVFP4", 3),
    BlockFormats("NVFP4"),
    BlockFormats("MXFP4", "MXFP4"),
    BlockFormats("MXFP8_E4M3", "MXFP8_E4M3", 2),
    BlockFormats("MXINT8", "MXINT8"),
    BlockFormats("NVFP4", "NVFP4", 0, searches_inputs=True),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(name, formats, dtype=torch.float32):
    torch.manual_seed(0)
    plain = LAYERS[name]().to(dtype)
    weight = plain.weight.detach().float()
    layer = family_of(plain).trainable_block.of(plain, weight, formats)
    if formats.branch_rank:
        rows, columns = weight.flatten(1).shape
        factors = torch.randn(formats.branch_rank, columns), torch.randn(rows, formats.branch_rank)
        down, up = (nn.Parameter(0.1 * each.to(dtype), requires_grad=False) for each in factors)
        layer.branch_down, layer.branch_up = down, up
    assert layer.formats == formats
    return layer.requires_grad_(False)


def inputs_of(layer, dtype=torch.float32, batch=2):
    places = layer.kind.places
    channels = layer.in_channels if places else layer.in_features
    shape = (batch, channels, *(5,) * places) if places else (batch, 3, channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "formats"), list(itertools.product(LAYERS, FORMATS)), ids=str)
def test_the_packed_layer_has_the_same_bits(name, formats, dtype):
    layer = made(name, formats, dtype)
    packed = layer.pack()
    assert isinstance(packed, BlockLayer)
    assert packed.formats == formats
    assert torch.equal(packed.weight, layer.quantized_weight())
    x = inputs_of(layer, dtype)
    assert torch.equal(packed(x), layer(x))
    again = family_of(packed).block.empty_like(LAYERS[name]().to(dtype), formats)
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), packed(x))


@pytest.mark.parametrize("name", LAYERS)
def test_rounding_twice_changes_nothing(name):
    for formats, dtype in itertools.product(FORMATS, DTYPES):
        layer = made(name, formats, dtype)
        rounded = layer.quantized_weight()
        layer.weight = nn.Parameter(rounded, requires_grad=False)
        assert torch.equal(layer.quantized_weight(), rounded)


def test_scales_stay_when_the_weight_changes():
    layer = made("linear", FORMATS[0])
    before = layer.block_quantizer.codes.clone()
    layer.weight = nn.Parameter(3 * layer.weight, requires_grad=False)
    packed = layer.pack()
    assert torch.equal(packed.weight_scale, before)
    assert torch.equal(packed.weight, layer.quantized_weight())


def test_scales_are_searched_for_less_error_than_those_of_the_rule():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for name, least in (("NVFP4", 0.8), ("MXFP4", 0.96)):
        errors = [
            (rounded - weight).square().sum()
            for rounded in (
                BlockQuantizer.of(name, weight)(weight),
                quantize_blocks(weight, name, axis=1),
            )
        ]
        assert errors[0] < least * errors[1]


def test_rows_are_searched_in_parts_with_the_same_result(monkeypatch):
    weight = torch.randn(7, 40)
    whole = BlockQuantizer.of("NVFP4", weight)
    monkeypatch.setattr("msfp.layers.block_quantizer.PART", 80)
    parts = BlockQuantizer.of("NVFP4", weight)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.tensor_scale, parts.tensor_scale)


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4", "MXFP8_E4M3"])
def test_no_scale_is_zero_and_blocks_of_zeros_are_zeros(name):
    weight = torch.randn(4, 64) * torch.tensor([0.0, 1e-9, 1.0, 1e9])[:, None]
    quantizer = BlockQuantizer.of(name, weight)
    assert (decode(quantizer.codes, PRESETS[name].scale) > 0).all()
    rounded = quantizer(weight)
    assert rounded.isfinite().all()
    assert not rounded[0].any()


def test_each_weight_has_the_scale_of_its_block():
    quantizer = BlockQuantizer.of("NVFP4", torch.randn(3, 20, 2))
    spread = quantizer.scales_of(torch.Size((3, 20, 2)))
    assert spread.shape == (3, 20, 2)
    assert torch.equal(spread[:, :16], quantizer.scale[:, :1].expand(3, 16, 2))
    assert torch.equal(spread[:, 16:], quantizer.scale[:, 1:].expand(3, 4, 2))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("searched", [False, True])
def test_samples_do_not_depend_on_the_others_of_their_batch(name, searched):
    layer = made(name, BlockFormats("NVFP4", "NVFP4", 0, searched))
    x = inputs_of(layer)
    x[1] *= 1000
    together = layer.quantize_input(x)
    alone = torch.cat([layer.quantize_input(each) for each in x.split(1)])
    assert torch.equal(together, alone)


def test_inputs_have_the_bits_of_the_format_for_each_sample():
    x = torch.randn(3, 5, 40) * torch.tensor([1e-6, 1.0, 1e6]).view(3, 1, 1)
    expected = torch.stack([quantize_blocks(each, "NVFP4") for each in x])
    assert torch.equal(quantize_input_blocks(x, PRESETS["NVFP4"], -1), expected)
    for name in ("MXFP4", "MXFP8_E4M3"):
        expected = quantize_blocks(x, name)
        assert torch.equal(quantize_input_blocks(x, PRESETS[name], -1), expected)


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
def test_searched_scales_of_inputs_have_less_error(name):
    x = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(0))
    errors = [
        (quantize_input_blocks(x, PRESETS[name], -1, searched=searched) - x).square().sum()
        for searched in (False, True)
    ]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("x", [torch.zeros(2, 16), torch.empty(0, 16), torch.ones(16)], ids=str)
def test_inputs_of_any_shape_are_rounded(x, searched):
    rounded = quantize_input_blocks(x, PRESETS["NVFP4"], -1, searched=searched)
    assert torch.equal(rounded, x)


@pytest.mark.parametrize("searched", [False, True])
def test_numbers_that_are_not_finite_stay_in_their_blocks(searched):
    x = torch.randn(2, 48)
    x[0, 0], x[1, 20] = torch.nan, torch.inf
    rounded = quantize_input_blocks(x, PRESETS["NVFP4"], -1, searched=searched)
    assert rounded[0, :16].isnan().all()
    assert rounded[0, 16:].isfinite().all()
    assert rounded[1].isfinite().all()


def test_a_layer_is_copied_and_cast_with_its_scales():
    layer = made("linear", FORMATS[0])
    other = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(other.block_quantizer.scale, layer.block_quantizer.scale)
    assert other.weight.dtype == torch.bfloat16


def test_a_branch_is_merged_or_removed():
    packed = made("linear", FORMATS[0]).pack()
    x = inputs_of(packed)
    plain = dequantized(packed)
    whole = packed.weight + packed.branch_up @ packed.branch_down
    assert torch.equal(plain.weight, whole)
    packed.remove_branch()
    assert packed.formats == BlockFormats("NVFP4", "NVFP4")
    bare = nn.functional.linear(packed.quantize_input(x), packed.weight, packed.bias)
    assert torch.equal(packed(x), bare)


@pytest.mark.slow
@pytest.mark.parametrize("formats", [FORMATS[0], FORMATS[-1]], ids=["rule", "searched"])
def test_compiling_without_a_graph_break_gives_the_same_bits(formats):
    packed = made("linear", formats).pack()
    x = inputs_of(packed)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(packed, fullgraph=True)(x), packed(x))
