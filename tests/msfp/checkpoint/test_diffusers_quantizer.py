import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import PipelineQuantizationConfig, UNet2DConditionModel
from elsewhere import use_pipelines
from families import (
    ENDS,
    FAMILIES,
    SOME,
    call,
    cast,
    images,
    load_pipeline,
    make,
    pipeline,
    quantized,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import forked
from torch import nn

from fpformats import parse
from msfp import (
    InputError,
    MSFPConfig,
    QuantizationConfig,
    QuantLinear,
    RefinementConfig,
    pack,
    quantize,
)
from msfp.checkpoint.integrity import BRANCH
from msfp.layers.attention import OPERANDS, attention_products
from msfp.layers.formats import LayerFormats
from msfp.layers.packed import packed_layers
from msfp.pipelines.denoiser import denoiser_name, denoiser_of

SPLIT = {"unet", "conditional_unet", "xl_unet"}
"""Families with layers that read a concatenation as it is, and find a signed format for it."""
DTYPES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."), marks=pytest.mark.slow)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]


class Pipelines(dict):
    """Pipelines by family, quantized in every way and saved to a folder at first use."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __missing__(self, family):
        every = RefinementConfig(split_inputs=True, branch_rank=1, samples=32)
        pipe = self[family] = pipeline(family, self.folder / f"{family} vocabulary")
        quantized(denoiser_of(pipe), refine=every, attention_bits=4)
        pipe.save_pretrained(self.folder / family)
        return pipe


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A folder, and a pipeline of each family that is saved to it."""
    folder = tmp_path_factory.mktemp("families")
    return folder, Pipelines(folder)


@pytest.fixture(scope="module", params=DTYPES)
def outputs_elsewhere(request, pipelines):
    """A dtype, and what a new process makes of the saved pipelines in it."""
    folder, pipes = pipelines
    for family in FAMILIES:
        pipes[family]
    output = folder / f"{request.param}.safetensors"
    forked(use_pipelines, (folder, request.param, torch.get_num_threads(), output), processes=1)
    return request.param, load_file(output)


@pytest.fixture(scope="module")
def untouched():
    return quantized(make("unet"))


@pytest.fixture
def unet(untouched):
    """A packed U-Net."""
    return copy.deepcopy(untouched)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_process_gives_the_same_bits(pipelines, outputs_elsewhere, family):
    dtype, outputs = outputs_elsewhere
    pipe = copy.deepcopy(pipelines[1][family])
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            cast(component, dtype)
    prediction = call(denoiser_of(pipe))
    assert prediction.dtype == dtype
    assert prediction.isfinite().all()
    assert torch.equal(prediction, outputs[f"{family} prediction"])
    assert torch.equal(images(pipe), outputs[f"{family} images"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_quantized_and_the_ends_to_eight_bits(pipelines, family):
    denoiser = denoiser_of(pipelines[1][family])
    layers = packed_layers(denoiser)
    plain = make(family)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    assert layers.keys() == {n for n, m in plain.named_modules() if isinstance(m, kinds)}
    assert {n for n, layer in layers.items() if layer.formats.weight.bits == 8} == ENDS[family]
    assert {n for n, layer in layers.items() if layer.formats.input.bits == 8} == ENDS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_has_the_size_of_bits_and_scales(pipelines, family):
    folder, pipes = pipelines
    denoiser = denoiser_of(pipes[family])
    expected = 0
    layers = packed_layers(denoiser)
    for layer in layers.values():
        expected += layer.weight_shape.numel() * layer.formats.weight.bits / 8
        expected += 4 * (len(layer.weight_scale) + layer.input_scale.numel() + 1)
        if layer.branch_up is not None:
            expected += 2 * (layer.branch_down.numel() + layer.branch_up.numel())
    others = {k: v for k, v in make(family).state_dict().items()
              if not (k.endswith(".weight") and k.removesuffix(".weight") in layers)}  # fmt: skip
    expected += sum(tensor.nbytes for tensor in others.values())
    component = denoiser_name(pipes[family])
    file = folder / family / component / "diffusion_pytorch_model.safetensors"
    with safe_open(file, "pt") as opened:
        held = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert held == pytest.approx(expected, rel=0.05)


def test_branches_are_stored_in_sixteen_bits_and_require_no_gradient(pipelines):
    folder, pipes = pipelines
    saved = denoiser_of(pipes["unet"]).state_dict()
    with safe_open(folder / "unet" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys() if key.endswith(BRANCH)}  # noqa: SIM118
    assert {factor.dtype for factor in stored.values()} == {torch.float16}
    loaded = dict(denoiser_of(load_pipeline(folder / "unet")).named_parameters())
    for key, factor in stored.items():
        assert torch.equal(loaded[key], saved[key])
        assert torch.equal(factor.float(), saved[key])
        assert not loaded[key].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_split_inputs_and_attention_products_are_among_what_is_saved(pipelines, family):
    folder, pipes = pipelines
    denoiser = denoiser_of(pipes[family])
    layers = packed_layers(denoiser).values()
    assert sum(layer.formats.branch_rank for layer in layers) > len(layers) / 2
    assert any(layer.input_scale.numel() > 1 for layer in layers) == (family in SPLIT)
    products = attention_products(denoiser)
    assert products
    again = denoiser_of(load_pipeline(folder / family))
    assert attention_products(again).keys() == products.keys()
    saved, loaded = (model.state_dict() for model in (denoiser, again))
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("family", SOME)
def test_weights_are_quantized_as_they_are_loaded(tmp_path, family):
    plain = make(family)
    plain.save_pretrained(tmp_path / "plain")
    config = MSFPConfig(weight_bits=4)
    loaded = type(plain).from_pretrained(tmp_path / "plain", quantization_config=config)
    quantize(plain, QuantizationConfig(weight_bits=4, activation_bits=None))
    pack(plain)
    assert torch.equal(call(loaded), call(plain))
    assert config.layers == {}
    loaded.save_pretrained(tmp_path / "packed")
    again = type(plain).from_pretrained(tmp_path / "packed")
    assert torch.equal(call(again), call(plain))


def test_weights_are_quantized_from_the_file_and_not_from_what_is_cast(tmp_path):
    plain = make("unet")
    plain.save_pretrained(tmp_path)
    load = type(plain).from_pretrained
    config = MSFPConfig(weight_bits=8)
    wide = load(tmp_path, quantization_config=config)
    narrow = load(tmp_path, quantization_config=config, torch_dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    for name, layer in packed_layers(narrow).items():
        assert torch.equal(layer.codes, wide.get_submodule(name).codes)
        assert torch.equal(layer.weight_scale, wide.get_submodule(name).weight_scale)
        assert layer.dtype == torch.bfloat16


@pytest.mark.parametrize("arguments", [
    {"quant_mapping": {"unet": MSFPConfig(weight_bits=4, exclude=["conv_in"])}},
    {
        "quant_backend": "msfp",
        "quant_kwargs": {"weight_bits": 4, "modules_to_not_convert": ["conv_in"]},
        "components_to_quantize": ["unet"],
    },
])  # fmt: skip
def test_a_pipeline_is_quantized_as_it_is_loaded(tmp_path, arguments):
    pipeline("conditional_unet", tmp_path / "vocabulary").save_pretrained(tmp_path / "plain")
    config = PipelineQuantizationConfig(**arguments)
    pipe = load_pipeline(tmp_path / "plain", quantization_config=config)
    assert type(pipe.unet.conv_in) is nn.Conv2d
    assert type(pipe.unet.time_embedding.linear_1) is QuantLinear
    assert not packed_layers(pipe.vae)
    before = images(pipe)
    pipe.save_pretrained(tmp_path / "packed")
    assert torch.equal(images(load_pipeline(tmp_path / "packed")), before)


def test_an_autoencoder_can_be_packed_as_well(tmp_path):
    pipeline("conditional_unet", tmp_path / "vocabulary").save_pretrained(tmp_path / "plain")
    config = PipelineQuantizationConfig(
        quant_backend="msfp",
        quant_kwargs={"weight_bits": 6, "end_bits": 6},
        components_to_quantize=["vae"],
    )
    pipe = load_pipeline(tmp_path / "plain", quantization_config=config)
    assert len(packed_layers(pipe.vae)) > 10


@pytest.mark.parametrize("family", SOME)
def test_dequantize_leaves_a_plain_denoiser_with_the_quantized_weights(tmp_path, family):
    denoiser = quantized(make(family), activation_bits=None)
    before = call(denoiser)
    weights = {name: layer.quantized_weight() for name, layer in packed_layers(denoiser).items()}
    plain = denoiser.dequantize()
    assert all(torch.equal(plain.get_submodule(n).weight, w) for n, w in weights.items())
    torch.testing.assert_close(call(plain), before, rtol=1e-4, atol=1e-5)
    assert [type(m) for m in plain.modules()] == [type(m) for m in make(family).modules()]
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = type(plain).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # Products of the last bit depend on where in memory the weights lie.
    torch.testing.assert_close(call(loaded), before, rtol=1e-4, atol=1e-5)


def test_dequantize_merges_branches_and_leaves_attention_as_it_was():
    plain, branches = make("unet"), RefinementConfig("nearest", branch_rank=4)
    branches = replace(branches, match_inputs=False, correct_bias="none")
    config = {"activation_bits": None, "weight_bits": 4, "end_bits": 4}
    quantized(plain, **config, refine=branches, attention_bits=8)
    rounded, merged = quantized(make("unet"), **config), copy.deepcopy(plain).dequantize()
    expected = call(make("unet"))
    errors = [(call(model) - expected).square().mean() for model in (merged, rounded)]
    assert 0 < errors[0] < errors[1]
    assert not attention_products(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in make("unet").modules()]
    assert not any(module._forward_hooks for module in merged.modules())


@pytest.mark.parametrize("arguments", [
    {"device_map": "cpu"},
    {"device_map": {"": "cpu"}},
    {"disable_mmap": True},
    {"quantization_config": MSFPConfig(weight_bits=8)},
])  # fmt: skip
def test_other_ways_to_load_give_the_same_bits(tmp_path, arguments):
    denoiser = quantized(make("unet"), weight_bits=5, activation_bits=3, end_bits=7)
    denoiser.save_pretrained(tmp_path)
    loaded = type(denoiser).from_pretrained(tmp_path, **arguments)
    assert torch.equal(call(loaded), call(denoiser))
    assert loaded.config.quantization_config.to_dict()["weight_bits"] == 5


def test_modules_that_diffusers_keeps_in_float32_are_kept(unet, tmp_path, monkeypatch):
    unet.save_pretrained(tmp_path)
    monkeypatch.setattr(type(unet), "_keep_in_fp32_modules", ["time_embedding"])
    loaded = type(unet).from_pretrained(tmp_path, torch_dtype=torch.float16)
    for layer, dtype in (
        (loaded.time_embedding.linear_1, torch.float32),
        (loaded.conv_in, torch.float16),
    ):
        assert layer.bias.dtype == layer.dtype == layer.weight.dtype == dtype


def test_shards_are_checked_together(unet, tmp_path):
    unet.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(call(type(unet).from_pretrained(tmp_path)), call(unet))
    tensors = load_file(shards[0])
    with safe_open(shards[0], "pt") as opened:
        says = opened.metadata()
    next(iter(tensors.values())).view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, shards[0], says)
    with pytest.raises(InputError, match="do not match their checksum"):
        type(unet).from_pretrained(tmp_path)


def test_errors_of_the_loader_say_what_is_wrong(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(OSError, match=r"Unable to load weights.*diffusion_pytorch_model"):
        type(unet).from_pretrained(tmp_path)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="do not match their checksum"):
        type(unet).from_pretrained(tmp_path)


def test_no_pickle_is_written(unet, tmp_path):
    with pytest.raises(InputError, match="safe_serialization must be True"):
        unet.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))


def test_a_trainable_denoiser_is_not_saved(tmp_path):
    denoiser = make("unet")
    quantize(denoiser, QuantizationConfig(), calibration=call)
    with pytest.raises(InputError, match="'conv_in' has no packed codes: pack the denoiser"):
        denoiser.save_pretrained(tmp_path)


def test_inputs_are_not_quantized_without_calibration(tmp_path):
    make("unet").save_pretrained(tmp_path)
    load_unet = type(make("unet")).from_pretrained
    for argument in ({"activation_bits": 4}, {"refine": RefinementConfig()}, {"attention_bits": 4}):
        with pytest.raises(InputError, match=f"{next(iter(argument))} must be None.*msfp.quantize"):
            load_unet(tmp_path, quantization_config=MSFPConfig(weight_bits=4, **argument))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"weight_bits": 9}, "weight_bits must be between 3 and 8, not 9"),
    ({"scheme": "fp"}, "scheme must be one of"),
    ({"wieght_bits": 4}, "quantization_config has no 'wieght_bits': it may have weight_bits, "),
    ({"exclude": "conv_in"}, "exclude must be a list of names or globs, not 'conv_in'"),
    ({"format_version": 3}, "a quantized denoiser of version 3; this msfp reads versions up to 2"),
    ({"layers": []}, "layers must be a table"),
    ({"products": []}, "products must be a table"),
    ({"products": {"attn": {"query": "E2M1"}}}, "products of 'attn' must have query, key"),
    ({"products": {"attn": dict.fromkeys(OPERANDS, "E9")}}, "query of 'attn' 'E9' is not a form"),
    ({"refine": {"sweeps": 1}}, "refine has no 'sweeps': it may have rounding, "),
    ({"refine": "best"}, "refine must be a RefinementConfig, 'auto' or None, not 'best'"),
    ({"attention_bits": 9}, "attention_bits must be between 3 and 8, not 9"),
    ({"adapters": 0}, "adapters must be a positive integer"),
    ({"router": "best"}, "router must be one of .*, not 'best'"),
    ({"quant_method": "gguf"}, "quant_method must be one of .*, not 'gguf'"),
])  # fmt: skip
def test_a_config_refuses_what_it_cannot_use(arguments, message):
    with pytest.raises(InputError, match=message):
        MSFPConfig(**arguments)


@pytest.mark.parametrize(("description", "message"), [
    ({"format_version": 1, "layers": []}, "layers must be a table"),
    ({"format_version": 1, "overrides": []}, "overrides must be a table"),
    ({"format_version": 1, "wieghts": 4}, "quantization_config has no 'wieghts'"),
    ({"format_version": 1, "weights": 9}, "weight_bits must be between 3 and 8, not 9"),
    ({"format_version": 0}, "a quantized denoiser of version 0"),
    ({"format_version": "1"}, "a quantized denoiser of version 1"),
])  # fmt: skip
def test_a_config_of_another_version_is_refused_by_what_is_wrong_with_it(description, message):
    with pytest.raises(InputError, match=message):
        MSFPConfig.from_dict(description)


def test_a_config_survives_json_and_shows_itself():
    config = MSFPConfig(
        weight_bits=5,
        end_bits=5,
        exclude=["a.*"],
        refine=RefinementConfig(positions=2),
        layers={"b": LayerFormats(parse("E2M2"), branch_rank=3).to_dict()},
        products={"attn": dict.fromkeys(OPERANDS, "E2M1")},
        retired={"sweeps": 2},
    )
    again = MSFPConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.layers["b"].weight == parse("E2M2")
    assert '"exclude"' in repr(config)


def test_include_and_exclude_choose_layers_and_unknown_names_are_refused(tmp_path):
    plain = make("conditional_unet")
    plain.save_pretrained(tmp_path)
    load = UNet2DConditionModel.from_pretrained
    config = MSFPConfig(include=["down_blocks", "*.to_q"], exclude=["*.conv1"], end_bits=4)
    names = set(packed_layers(load(tmp_path, quantization_config=config)))
    assert "down_blocks.0.resnets.0.conv2" in names
    assert "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" in names
    assert not any(name.endswith("conv1") or name.startswith("conv_") for name in names)
    for argument in ("include", "exclude"):
        with pytest.raises(InputError, match=f"{argument} has 'no_such', which matches no layer"):
            load(tmp_path, quantization_config=MSFPConfig(**{argument: ["no_such"]}))
    with pytest.raises(InputError, match="include and exclude leave no layer of"):
        load(tmp_path, quantization_config=MSFPConfig(exclude=["*"]))


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path):
    plain = make("unet")
    with torch.no_grad():
        plain.conv_out.weight[0, 0, 0, 0] = torch.inf
    plain.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the weight of layer 'conv_out' is not finite"):
        type(plain).from_pretrained(tmp_path, quantization_config=MSFPConfig(weight_bits=4))


def test_loading_leaves_the_random_numbers_of_the_process_alone(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    type(unet).from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
