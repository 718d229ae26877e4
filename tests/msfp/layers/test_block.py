import copy
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from elsewhere import use_unets
from families import call, cast, make
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scripts import forked
from torch import nn

from fpformats import quantize_blocks
from fpformats.ops.block_formats import PRESETS
from msfp import (
    FinetuneConfig,
    InputError,
    MSFPConfig,
    QuantizationConfig,
    cache_weights,
    finetune,
    inspect_layers,
    load,
    pack,
    quantize,
    save,
    unpack,
)
from msfp.checkpoint.integrity import describe
from msfp.layers.block import BlockLayer, block_layers
from msfp.layers.families import BlockLinear, family_of
from msfp.layers.formats import BlockFormats
from msfp.layers.selection import quantizable_layers
from msfp.reports.layer_table import cells

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
LOADED_DTYPES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "torch.float32")) for name in DTYPES
]
CONFIGS = {
    "mx": QuantizationConfig(scheme="mx", refine=None),
    "mx6": QuantizationConfig(scheme="mx", weight_bits=6, activation_bits=None, refine=None),
    "nvfp4": QuantizationConfig(scheme="nvfp4", refine=None),
    "nvfp4_int4": QuantizationConfig(scheme="nvfp4_int4", refine=None),
    "mixed": QuantizationConfig(
        refine=None, overrides={"mid_block": {"scheme": "nvfp4"}, "*.conv1": {"scheme": "mx"}}
    ),
}
"""What unets are quantized to; the last has layers with scales for channels, too."""
TENSORS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def unets():
    """Unets in blocks, packed; not to be changed."""
    made = {}
    for name, config in CONFIGS.items():
        made[name] = make("unet")
        quantize(made[name], config, calibration=call)
        pack(made[name])
    return made


@pytest.fixture(scope="module")
def folder(unets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    for name, unet in unets.items():
        unet.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", params=LOADED_DTYPES)
def outputs_elsewhere(request, folder):
    """The name of a dtype, and what a new process makes of the saved unets in it."""
    output = folder / f"{request.param}.safetensors"
    words = (folder, [*CONFIGS], DTYPES[request.param], torch.get_num_threads(), output)
    forked(use_unets, words, processes=1)
    return request.param, load_file(output)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_new_process_gives_the_same_bits(unets, outputs_elsewhere, config):
    dtype, outputs = outputs_elsewhere
    unet = cast(copy.deepcopy(unets[config]), DTYPES[dtype])
    assert block_layers(unet)
    prediction = call(unet)
    assert prediction.dtype == DTYPES[dtype]
    assert torch.equal(prediction, outputs[config])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(1, 70), min_size=2, max_size=2),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(0, 2**32 - 1),
    st.integers(-30, 30),
)
def test_the_packed_weight_is_the_rounded_one(name, dtype, channels, kernel, seed, exponent):
    """Tiny blocks have scales of zero in NVFP4, and signed zeros stay as they are."""
    torch.manual_seed(seed)
    kind = (nn.Linear, nn.Conv1d, nn.Conv2d)[len(kernel)]
    layer = kind(*channels, tuple(kernel)) if kernel else kind(*channels)
    spread = torch.randint(-20, 20, layer.weight.shape[:2]).view(
        *channels[::-1], *[1] * len(kernel)
    )
    weight = (torch.randn(layer.weight.shape) * 2.0**exponent * 2.0**spread).to(DTYPES[dtype])
    weight.masked_fill_(torch.rand(weight.shape) < 0.1, -0.0).clamp_(-6e4, 6e4)
    layer.weight = nn.Parameter(weight)
    packed = family_of(layer).block.of_weight(layer, weight, BlockFormats(name))
    expected = quantize_blocks(weight, PRESETS[name], axis=1)
    if PRESETS[name].twos_complement:  # integers have one zero
        expected = expected + 0.0
    assert packed.weight.dtype == DTYPES[dtype]
    assert torch.equal(packed.weight.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("config", CONFIGS)
def test_the_file_has_the_size_of_bits_and_scales(unets, folder, config):
    plain = make("unet")
    layers = quantizable_layers(plain)
    expected = sum(tensor.nbytes for tensor in plain.state_dict().values())
    for name, layer in unets[config].named_modules():
        if name in layers:
            weight = layers[name].weight
            expected -= weight.nbytes
            expected += weight.numel() * layer.formats.bits / 8
            if isinstance(layer, BlockLayer):
                blocks = -(-weight.shape[1] // layer.formats.weight_blocks.size)
                expected += weight.numel() // weight.shape[1] * blocks
            else:
                expected += 4 * len(weight)
    held = sum(tensor.nbytes for tensor in load_file(folder / config / TENSORS).values())
    assert expected <= held < 1.05 * expected


def test_what_a_file_says_of_a_layer_is_what_it_rounds_to(unets, folder):
    for name, unet in unets.items():
        facts = inspect_layers(folder / name)
        assert [cells(each) for each in facts] == [cells(each) for each in inspect_layers(unet)]
        in_blocks = [each for each in facts if each.layer in block_layers(unet)]
        assert in_blocks
        for each in in_blocks:
            layer = unet.get_submodule(each.layer)
            assert each.weight_clip >= layer.weight.abs().max()
            tensors = [*layer.parameters(), *layer.buffers()]
            assert each.bytes == sum(tensor.nbytes for tensor in tensors)
            row = each.to_dict()
            assert row["weight_format"] == layer.formats.weight
            assert row["input_format"] == layer.formats.input
            assert row["clip_low"] is row["zero_point"] is None
            assert row["weight_sqnr"] > 10


def test_packing_leaves_layers_in_blocks_as_they_are(unets):
    unet = copy.deepcopy(unets["nvfp4"])
    pack(unet)
    assert torch.equal(call(unet), call(unets["nvfp4"]))
    assert len(block_layers(unet)) == len(quantizable_layers(make("unet")))


def test_the_cache_and_the_plain_layers_have_the_same_bits(unets):
    unet = copy.deepcopy(unets["mx6"])
    expected = call(unet)
    cache_weights(unet)
    assert torch.equal(call(unet), expected)
    plain = unet.dequantize()
    assert not block_layers(plain)
    assert torch.equal(call(plain), expected)


def test_a_model_is_quantized_to_blocks_as_it_is_loaded(tmp_path, unets):
    make("unet").save_pretrained(tmp_path / "plain")
    config = MSFPConfig(scheme="nvfp4", activation_bits=4)
    unet = UNet2DModel.from_pretrained(tmp_path / "plain", quantization_config=config)
    assert torch.equal(call(unet), call(unets["nvfp4"]))
    unet.save_pretrained(tmp_path / "packed")
    again = UNet2DModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(call(again), call(unet))
    rows = [cells(each) for each in inspect_layers(tmp_path / "packed")]
    assert rows == [cells(each) for each in inspect_layers(unets["nvfp4"])]
    config = MSFPConfig(
        scheme="nvfp4", activation_bits=4, overrides={"mid_block": {"scheme": "mixup"}}
    )
    with pytest.raises(InputError, match="activation_bits must be None"):
        UNet2DModel.from_pretrained(tmp_path / "plain", quantization_config=config)


def test_a_network_outside_diffusers_is_saved_and_loaded(tmp_path):
    network = nn.Sequential(nn.Linear(40, 16), nn.SiLU(), nn.Linear(16, 8))
    plain = copy.deepcopy(network)
    quantize(network, QuantizationConfig(scheme="nvfp4", end_bits=4))
    save(network, tmp_path / "network")
    loaded = load(tmp_path / "network", into=plain)
    x = torch.randn(3, 40)
    assert torch.equal(loaded(x), network(x))


def test_a_new_layer_is_a_plain_one_until_it_is_given_formats():
    layer = BlockLinear(40, 6)
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not block_layers(nn.Sequential(layer))


def test_layers_in_blocks_are_not_fine_tuned(unets, trajectories):
    unet = copy.deepcopy(unets["mixed"])
    refused = r"layer '.*' cannot be fine-tuned: weight=(NVFP4|MXFP4).* are block formats"
    with pytest.raises(InputError, match=refused):
        finetune(unet, FinetuneConfig(), trajectories=trajectories)
    with pytest.raises(InputError, match=refused):
        unpack(unet, original=make("unet"))


def damaged(folder, to, change):
    """Write a changed copy of the unet in NVFP4 with a checksum that fits."""
    config = json.loads((folder / "nvfp4" / "config.json").read_text())
    tensors = load_file(folder / "nvfp4" / TENSORS)
    change(config["quantization_config"], tensors)
    to.mkdir()
    (to / "config.json").write_text(json.dumps(config))
    description = config["quantization_config"]
    save_file(tensors, to / TENSORS, describe(tensors, description) | {"format": "pt"})
    return to


def of_layer(**changes):
    return lambda config, _: config["layers"][INNER].update(changes)


def tensor(leaf, value):
    return lambda _, tensors: tensors.update({f"{INNER}.{leaf}": value(tensors[f"{INNER}.{leaf}"])})


INNER = "mid_block.resnets.0.conv1"
DAMAGE = {
    "format": (of_layer(weight_format="MXFP5"), "weight_format must be one of .*'MXFP4'.*'MXFP5'"),
    "no name": (of_layer(weight_format=["NVFP4"]), "weight_format must be one of"),
    "input": (of_layer(input_format="E2M1"), "input_format must be one of"),
    "granularity": (of_layer(weight_granularity="channel"), "input_granularity must be one of"),
    "mixed": (of_layer(input_granularity="tensor"), "input_granularity must be one of"),
    "branch": (of_layer(branch_rank=1), "tensors are missing: .*branch_down"),
    "no rank": (of_layer(branch_rank=-1), "branch_rank must be a whole number"),
    "input scales": (of_layer(input_scales="best"), "input_scales must be one of"),
    "rotation": (of_layer(input_rotation=32), r"input_rotation must be one of \(16, 64, 256\)"),
    "rotated": (
        of_layer(input_rotation=256),
        "input_rotation must be .* divide its input channels",
    ),
    "branches": (of_layer(branch_rank=1, branch_adapters=2), "branch_adapters must be absent"),
    "other format": (of_layer(weight_format="MXFP4"), r"tensor_scale|weight_scale"),
    "adapters": (lambda config, _: config.update(adapters=2), "adapters must be 1"),
    "short codes": (tensor("codes", lambda t: t[:-1].clone()), r"codes expected shape"),
    "scales": (tensor("weight_scale", lambda t: t[:, :0].clone()), "weight_scale expected shape"),
    "wide scales": (tensor("weight_scale", lambda t: t.int()), "must be torch.uint8"),
    "nan": (tensor("weight_scale", lambda t: t.fill_(0x7F)), "codes of finite, non-negative"),
    "negative": (tensor("weight_scale", lambda t: t | 0x80), "codes of finite, non-negative"),
    "no scale": (lambda _, tensors: tensors.pop(f"{INNER}.tensor_scale"), "missing"),
    "zero": (tensor("tensor_scale", torch.zeros_like), "must be positive and finite"),
    "left over": (of_layer(weight_format="MXFP8_E4M3"), "unexpected tensors|expected shape"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_what_is_wrong(folder, tmp_path, damage):
    change, message = DAMAGE[damage]
    with pytest.raises((InputError, ValueError), match=message):
        UNet2DModel.from_pretrained(damaged(folder, tmp_path / "damaged", change))


def test_a_file_that_is_cut_short_or_changed_is_refused(folder, tmp_path):
    to = damaged(folder, tmp_path / "whole", lambda *_: None)
    assert torch.equal(
        call(UNet2DModel.from_pretrained(to)), call(UNet2DModel.from_pretrained(folder / "nvfp4"))
    )
    data = bytearray((to / TENSORS).read_bytes())
    (to / TENSORS).write_bytes(data[:-100])
    with pytest.raises((InputError, OSError), match="safetensors"):
        UNet2DModel.from_pretrained(to)
    data[-1000] ^= 1
    (to / TENSORS).write_bytes(data)
    with pytest.raises(InputError, match="checksum"):
        UNet2DModel.from_pretrained(to)
