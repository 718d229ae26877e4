import copy
import json
import math

import families
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from tiny import tiny_pipeline
from torch import nn

from fpformats import quantize_blocks
from fpformats.ops.block_formats import MXFP4, MXINT8, NVFP4
from msfp import (
    Calibration,
    FinetuneConfig,
    InputError,
    MSFPConfig,
    QuantizationConfig,
    RefinementConfig,
    Sampler,
    Trajectories,
    cache_weights,
    calibrate,
    estimate,
    finetune,
    inspect_coverage,
    load,
    pack,
    precompute_routing,
    prompt_calls,
    quantize,
    record_trajectories,
    refine,
    save,
    unpack,
)
from msfp.evaluation.prediction_errors import noise_errors
from msfp.layers.attention import OPERANDS, attention_products
from msfp.layers.base import quantized_layers
from msfp.layers.block import BlockLayer, block_layers
from msfp.layers.selection import quantizable_layers
from msfp.layers.trainable import trainable_layers
from msfp.pipelines.denoiser import denoiser_name, denoiser_of
from msfp.support.hooks import hooked

GUIDED = dict.fromkeys(("unet", "conditional_unet", "xl_unet", "pixart", "sd3"), 2) | {"dit": 4}
"""Samples in a forward of each family's fixed call: both branches of classifier-free guidance.

The unconditional pipeline makes two images, and that of classes, too; that of Flux has no branches.
"""

NAMED = {name: {"SiLU"} if "unet" in name else {"SiLU", "GELU"} for name in families.FAMILIES}
"""Activations that are named before asymmetric inputs of each family."""


@pytest.mark.parametrize("family", families.SOME)
def test_a_pipeline_of_any_family_is_quantized_in_one_call_and_saved(family, tmp_path):
    pipe = families.pipeline(family, tmp_path / "text")
    denoiser = denoiser_of(pipe)
    plain = quantizable_layers(denoiser)
    before = families.images(pipe)
    batches = []
    handle = next(iter(plain.values())).register_forward_pre_hook(
        lambda _layer, args: batches.append(len(args[0]))
    )
    with hooked([handle]):
        summaries = quantize(pipe, QuantizationConfig(), calibration=families.images)
    reasons = {summary.reason for summary in summaries if summary.asymmetric}
    assert reasons <= {"data", "SiLU", "GELU"}
    assert NAMED[family] <= reasons
    for summary in summaries:
        assert summary.asymmetric == (summary.reason is not None)
        # GEGLU multiplies after its GELU, and attention after its softmax.
        if summary.name.endswith(("net.2", "to_out.0")) and family == "conditional_unet":
            assert summary.activation is None
    # Two steps to calibrate and record, of which the first runs again with another sample; rows
    # that are put together otherwise; two single samples three times, to see that they can wait
    # for each other; all that was recorded, to see the sizes of channels, to look for
    # concatenations, to search rotations and to compare them; two single samples, to see which
    # layers depend on them; all in full precision and quantized, to refine by; and up to eight
    # samples, to measure.
    rows = GUIDED.get(family, 1)
    tried = [1, rows + 1] if rows < 3 else [1]
    assert batches == [rows] * 3 + tried + [1] * 6 + [
        *[2 * rows] * 4,
        1,
        1,
        2 * rows,
        2 * rows,
        min(8, 2 * rows),
    ]
    assert [summary.name for summary in summaries] == list(plain)
    assert quantized_layers(denoiser).keys() == plain.keys()
    pack(denoiser)
    after = families.images(pipe)
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    save(denoiser, tmp_path / "denoiser")
    pipe.register_modules(
        **{denoiser_name(pipe): type(denoiser).from_pretrained(tmp_path / "denoiser")}
    )
    assert torch.equal(families.images(pipe), after)


def test_prompts_are_encoded_and_sampled_with_both_branches_of_guidance(tmp_path):
    pipe = families.pipeline("conditional_unet", tmp_path)
    arguments = {"height": 16, "width": 16}
    calls = prompt_calls(["a", "a a"], steps=3, **arguments)
    calibration = calibrate(pipe, calls=calls)
    assert list(calibration.timesteps.values()) == [2] * 3
    text = next(name for name in calibration.inputs if name.endswith("attn2.to_k"))
    # Two prompts, three steps and two branches, of 5 tokens of width 8.
    assert calibration.inputs[text].count == 2 * 3 * 2 * 5 * 8
    unguided = calibrate(
        pipe, calls=prompt_calls(["a", "a a"], steps=3, guidance_scale=1, **arguments)
    )
    assert unguided.inputs[text].count == calibration.inputs[text].count / 2


def test_class_labels_are_sampled_like_prompts(tmp_path):
    pipe = families.pipeline("dit", tmp_path)
    calibration = calibrate(pipe, calls=prompt_calls([1, 7], steps=2))
    assert set(calibration.timesteps.values()) == {2}


def refinement_of(denoiser):
    return denoiser.hf_quantizer.quantization_config.request.refine


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, RefinementConfig()),
        ({"scheme": "signed"}, RefinementConfig()),
        ({"activation_bits": None}, RefinementConfig()),
        ({"refine": None}, None),
        ({"scheme": "int_mse"}, None),
        ({"scheme": "mx"}, RefinementConfig()),
        ({"overrides": {"mid_block": {"scheme": "mx"}}}, RefinementConfig()),
        ({"scheme": "int_mse", "refine": {"rounding": "nearest"}}, RefinementConfig("nearest")),
    ],
)
def test_weights_are_refined_by_default_where_calls_are_given_to_a_scheme_of_floats(
    config, expected
):
    denoiser, plain = families.make("unet"), families.make("unet")
    some = QuantizationConfig(**config, include=["mid_block"], first_layers=[], last_layers=[])
    quantize(denoiser, some, calibration=families.call)
    assert refinement_of(denoiser) == expected
    changed = [
        name
        for name, layer in trainable_layers(denoiser).items()
        if not torch.equal(layer.weight, plain.get_submodule(name).weight)
    ]
    # Layers that round to nearest keep the full-precision weight while they are trainable.
    assert bool(changed) == (expected is not None)


def test_calls_are_made_once_to_calibrate_and_to_refine_by():
    calls, made = Sampler(2, 4).calls(8, seed=3), []

    def counted(call):
        return lambda pipe: (made.append(call), call(pipe))

    config = QuantizationConfig(
        include=["mid_block", "up_blocks.0"], end_bits=4, attention_bits=5,
        refine=RefinementConfig(samples=8),
    )  # fmt: skip
    once, twice = tiny_pipeline(), tiny_pipeline()
    found = quantize(once, config, calibration=[counted(call) for call in calls])
    assert made == calls
    seen, paths = calibrate(twice, calls=calls), record_trajectories(twice, calls=calls)
    assert found == quantize(twice, config, calibration=seen, trajectories=paths)
    states = [pipe.unet.state_dict() for pipe in (once, twice)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_calibration_alone_gives_nothing_to_refine_by_and_trajectories_do():
    plain = families.make("unet")
    calibration = calibrate(plain, calls=families.call)
    paths = record_trajectories(plain, calls=families.call)
    with pytest.raises(InputError, match="refine needs calls of the pipeline as calibration, or"):
        config = QuantizationConfig(refine=RefinementConfig())
        quantize(plain, config, calibration=calibration)
    with pytest.raises(InputError, match="attention_bits needs calls"):
        quantize(plain, QuantizationConfig(attention_bits=4), calibration=calibration)
    with pytest.raises(InputError, match="attention_bits must be None where layers are in block"):
        config = QuantizationConfig(scheme="mx", attention_bits=4)
        quantize(plain, config, calibration=families.call)
    assert not quantized_layers(plain)
    rounded, refined, at_once = (copy.deepcopy(plain) for _ in range(3))
    config = QuantizationConfig(include=["mid_block"], end_bits=4)
    quantize(rounded, config, calibration=calibration)
    assert refinement_of(rounded) is None
    quantize(refined, config, calibration=calibration, trajectories=paths)
    quantize(at_once, config, calibration=families.call)
    assert torch.equal(families.call(refined), families.call(at_once))
    assert not torch.equal(families.call(refined), families.call(rounded))


def test_everything_beyond_the_paper_is_done_in_one_call():
    denoiser = families.make("unet")
    refinement = RefinementConfig(split_inputs=True, branch_rank=2)
    config = QuantizationConfig(scheme="signed", refine=refinement, attention_bits=5)
    summaries = quantize(denoiser, config, calibration=families.call)
    layers = trainable_layers(denoiser)
    assert {layer.formats.branch_rank for layer in layers.values()} == {0, 2}
    assert {layer.formats.input_granularity for layer in layers.values()} == {"tensor", "channel"}
    assert all(
        products[name].format.bits == 5
        for products in attention_products(denoiser).values()
        for name in OPERANDS
    )
    for summary in summaries:
        assert summary.weight_format == str(layers[summary.name].weight_quantizer.format)
        assert summary.weight_sqnr == summary.weight_choices[summary.weight_format]
        assert summary.input_format == str(layers[summary.name].input_quantizer.format)


def test_calls_that_cannot_be_recorded_together_are_calibrated_with_and_no_more():
    def other(denoiser):
        families.call(denoiser, timestep=3)

    denoiser = families.make("unet")
    with pytest.warns(UserWarning, match="rounded to nearest and not refined: all calls must take"):
        quantize(denoiser, QuantizationConfig(), calibration=[families.call, other])
    assert refinement_of(denoiser) is None
    config = QuantizationConfig(refine=RefinementConfig())
    with pytest.raises(InputError, match="all calls must take the sampler through the same"):
        quantize(families.make("unet"), config, calibration=[families.call, other])


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_a_refinement_that_fails_leaves_the_denoiser_as_it_was(error):
    def fail(stage, done, *_):
        if (stage, done) == ("refining", 2):
            raise error

    denoiser, plain = families.make("unet"), families.make("unet")
    with pytest.raises(error):
        quantize(denoiser, QuantizationConfig(), calibration=families.call, progress=fail)
    assert not quantized_layers(denoiser)
    assert torch.equal(families.call(denoiser), families.call(plain))


class Network(nn.Module):
    """A network of three kinds of layers that has no timestep, and one that never runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Conv1d(4, 64, 3, padding=1)
        self.conv = nn.Conv2d(64, 64, (1, 3), padding=(0, 1))
        self.out = nn.Linear(64, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.conv(F.silu(self.inner(x)).unsqueeze(2)).squeeze(2)
        return self.out(F.gelu(hidden).mT)


X = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(3))


def drive(network):
    """Run a network."""
    return network(X)


def test_a_plain_network_is_driven_by_a_function_and_idle_layers_are_left():
    network = Network()
    with pytest.warns(UserWarning, match="layers that never ran .* full precision: idle"):
        summaries = quantize(network, QuantizationConfig(), calibration=drive)
    assert [(s.name, s.reason) for s in summaries] == [
        ("inner", None), ("conv", "SiLU"), ("out", "GELU"),
    ]  # fmt: skip
    assert type(network.idle) is nn.Linear
    # Without a layer of a known name, the first and the last to run have 8 bits.
    bits = {s.name: network.get_submodule(s.name).weight_quantizer.format.bits for s in summaries}
    assert bits == {"inner": 8, "conv": 4, "out": 8}


def test_overrides_go_before_the_ends_and_later_ones_before_earlier_ones():
    network = Network()
    config = QuantizationConfig(
        weight_bits=5,
        exclude=("idle",),
        overrides={
            "*": {"activation_bits": 6},
            "inner": {"weight_bits": 3, "activation_bits": None},
            "con?": {"scheme": "int_mse", "granularity": "tensor"},
        },
    )
    summaries = {s.name: s for s in quantize(network, config, calibration=drive)}
    inner, conv, out = (network.get_submodule(name) for name in ("inner", "conv", "out"))
    assert (inner.weight_quantizer.format.bits, inner.input_quantizer) == (3, None)
    assert summaries["inner"].input_format is None
    assert (summaries["conv"].weight_format, summaries["conv"].input_format) == ("E0M4", "E0M5")
    assert len(conv.weight_quantizer.scale.unique()) == 1
    assert (out.weight_quantizer.format.bits, out.input_quantizer.format.bits) == (8, 6)
    assert len(out.weight_quantizer.scale.unique()) == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"overrides": {"nothing": {"weight_bits": 4}}}, "has 'nothing', which matches no layer"),
        ({"overrides": {"conv": {"weight_bits": 2}}}, "weight_bits must be between 3 and 8, not 2"),
        (
            {"overrides": {"conv": {"scheme": "mx"}}, "weight_bits": 5},
            r"weight_bits must be one of \(4, 6, 8\) with scheme 'mx'",
        ),
    ],
)
def test_overrides_that_cannot_be_met_are_refused_before_calibration(config, message):
    network = Network()
    with pytest.raises(InputError, match=message):
        quantize(network, QuantizationConfig(**config), calibration=pytest.fail)
    assert type(network.conv) is nn.Conv2d


def test_weights_of_one_scale_do_worse_than_with_one_for_each_channel():
    by_channel, by_tensor = (
        quantize(
            Network(), QuantizationConfig(granularity=granularity, exclude=("idle",)),
            calibration=drive,
        )
        for granularity in ("channel", "tensor")
    )  # fmt: skip
    for channel, tensor in zip(by_channel, by_tensor, strict=True):
        assert channel.weight_sqnr > tensor.weight_sqnr


def test_a_summary_tells_what_the_other_choices_would_have_cost():
    network = Network()
    config = QuantizationConfig(exclude=("idle",))
    summaries = quantize(network, config, calibration=drive)
    conv = summaries[1]
    assert list(conv.weight_choices) == ["E1M2", "E2M1", "E3M0"]
    assert list(conv.input_choices) == [
        "E1M2", "E2M1", "E3M0", "E1M3U", "E2M2U", "E3M1U", "E4M0U",
    ]  # fmt: skip
    assert conv.input_sqnr == max(conv.input_choices.values()) == conv.input_choices["E2M2U"]
    assert conv.weight_sqnr == max(conv.weight_choices.values())
    assert conv.signed_input_sqnr == max(list(conv.input_choices.values())[:3])
    plain = json.loads(json.dumps([s.to_dict() for s in summaries], allow_nan=False))
    assert plain[1]["input_choices"] == conv.input_choices


def test_numbers_that_are_not_finite_are_refused_by_the_name_of_the_layer():
    def broken(network):
        network(torch.full((1, 4, 50), math.inf))

    network = Network()
    with pytest.raises(InputError, match="input of layer 'inner' had 200 numbers that are NaN or"):
        quantize(network, QuantizationConfig(exclude=("idle",)), calibration=broken)
    assert type(network.inner) is nn.Conv1d


def test_activations_are_not_quantized_without_calibration():
    with pytest.raises(InputError, match="calibration must be given, such as a function"):
        quantize(Network(), QuantizationConfig(end_bits=4))
    with pytest.raises(InputError, match="no inputs for the layer 'conv'"):
        known = Calibration({"inner": calibrate(Network(), calls=drive).inputs["inner"]})
        quantize(Network(), QuantizationConfig(end_bits=4), calibration=known)


@pytest.mark.parametrize("scheme", ["mx", "nvfp4"])
def test_block_formats_round_weight_and_input_along_the_input_channels(scheme):
    network = Network()
    plain = copy.deepcopy(network)
    inner = MXFP4 if scheme == "mx" else NVFP4
    config = QuantizationConfig(scheme=scheme, exclude=("idle",), refine=None)
    summaries = quantize(network, config, calibration=drive)
    assert all(isinstance(layer, BlockLayer) for layer in block_layers(network).values())
    assert [s.weight_format for s in summaries] == [
        "MXINT8", "MXFP4" if scheme == "mx" else "NVFP4", "MXINT8",
    ]  # fmt: skip
    assert [s.input_format for s in summaries] == [s.weight_format for s in summaries]

    def rounded(layer, x, fmt, axis):
        layer.weight.data = quantize_blocks(layer.weight.data, fmt, axis=1)
        samples = [quantize_blocks(each, fmt, axis=axis) for each in x.split(1)]
        return layer(torch.cat(samples))

    hidden = F.silu(rounded(plain.inner, X, MXINT8, 1)).unsqueeze(2)
    hidden = F.gelu(rounded(plain.conv, hidden, inner, 1).squeeze(2)).mT
    assert torch.equal(network(X), rounded(plain.out, hidden, MXINT8, -1))


def test_block_formats_take_no_calibration_and_no_second_quantization():
    network = Network()
    config = QuantizationConfig(
        scheme="mx", exclude=("idle",), first_layers=("inner",), last_layers=("out",)
    )
    quantize(network, config)
    with pytest.raises(InputError, match="quantized already"):
        quantize(network, config)


def test_a_pipeline_is_quantized_from_a_state_file_without_being_called(tmp_path):
    file = tmp_path / "state.safetensors"
    calls = Sampler(2, 2).calls(4, seed=0)
    first = tiny_pipeline()
    done = quantize(
        first, QuantizationConfig(), calibration=calibrate(first, calls=calls, file=file)
    )
    again = quantize(tiny_pipeline(), QuantizationConfig(), calibration=Calibration.load(file))
    assert again == done


def test_a_layer_that_no_module_holds_is_refused():
    with pytest.raises(InputError, match=r"must hold its layers in a module.*: it is a Linear"):
        quantize(nn.Linear(3, 3), QuantizationConfig(activation_bits=None, end_bits=4))


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"weight_bits": 4}, {}, "config must be of the type QuantizationConfig, not dict"),
        (MSFPConfig(), {}, "config must be of the type QuantizationConfig, not MSFPConfig"),
        (
            QuantizationConfig(),
            {"calibration": "x.safetensors"},
            r"calibration must be .* or what msfp\.calibrate returned, not 'x.safetensors'",
        ),
        (
            QuantizationConfig(),
            {"calibration": Trajectories(*torch.zeros(3, 1))},
            r"calibration must be .* or what msfp\.calibrate returned, not Trajectories",
        ),
        (
            QuantizationConfig(),
            {"trajectories": Calibration({})},
            "trajectories must be of the type Trajectories, not Calibration",
        ),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(config, arguments, message):
    with pytest.raises(InputError, match=message):
        quantize(families.make("unet"), config, **arguments)


def test_a_pipeline_stands_for_its_denoiser_everywhere():
    reference, pipe, tuned = tiny_pipeline(), tiny_pipeline(), tiny_pipeline()
    calls = Sampler(2, 2).calls(4, seed=0)
    trajectories = record_trajectories(reference, calls=calls)
    calibration = calibrate(pipe, calls=calls)
    some = QuantizationConfig(include=["mid_block"], end_bits=4, refine=None)
    for each in (pipe, tuned):
        quantize(each, some, calibration=calibration)
    refine(
        pipe, RefinementConfig(samples=2, positions=64, branch_rank=0), trajectories=trajectories
    )
    pack(pipe)
    cache_weights(pipe)
    precompute_routing(pipe, timesteps=trajectories.timesteps)
    assert noise_errors(pipe, trajectories=trajectories) == noise_errors(
        pipe.unet, trajectories=trajectories
    )
    unpack(pipe, original=reference)
    assert trainable_layers(pipe.unet)
    finetune(
        tuned,
        FinetuneConfig(steps=1, batch=2, rank=1),
        trajectories=trajectories,
        original=reference,
    )
    assert not trainable_layers(tuned.unet)


def test_a_denoiser_that_is_quantized_is_not_calibrated(quantized, sampler):
    with pytest.raises(InputError, match="the denoiser is quantized already"):
        calibrate(quantized()[0], calls=sampler.calls(8, seed=0))


class Encoder(nn.Module):
    """A network with layers that torch fuses in evaluation, if it may."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.last(self.encoder(self.first(x)))


@torch.no_grad()
def test_layers_that_torch_fuses_are_quantized_refined_and_saved(tmp_path):
    full, x = Encoder().eval(), torch.randn(8, 8, 16)
    before, errors = full(x), []
    for refinement in (None, "auto"):
        network = copy.deepcopy(full)
        config = QuantizationConfig(refine=refinement)
        quantize(network, config, calibration=lambda network: network(x))
        trainable = network(x)
        pack(network)
        after = network(x)
        assert torch.allclose(trainable, after, atol=1e-3)
        errors.append((after - before).square().mean().item())
    hooked_network, runs = copy.deepcopy(network), []
    for layer in quantized_layers(hooked_network).values():
        layer.register_forward_hook(lambda *_: runs.append(1))
    assert torch.equal(hooked_network(x), after)  # with hooks, torch fuses nothing
    assert len(runs) == 6
    assert errors[1] < errors[0] < 0.01 * before.square().mean().item()
    save(network, tmp_path / "packed")
    assert torch.equal(load(tmp_path / "packed", into=Encoder().eval())(x), after)
    names = {each.kind for each in inspect_coverage(network).left().values()}
    assert names == {"MultiheadAttention", "NonDynamicallyQuantizableLinear"}


@pytest.fixture(scope="module")
def with_loras(tmp_path_factory):
    """A pipeline with three LoRAs loaded, of which two are in use."""
    pipe = families.pipeline("conditional_unet", tmp_path_factory.mktemp("text"))
    torch.manual_seed(1)
    for name, targets in (("a", ["to_q", "conv1"]), ("b", ["to_k", "to_q"]), ("c", ["to_v"])):
        lora = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
        pipe.unet.add_adapter(lora, adapter_name=name)
    pipe.unet.set_adapters(["a", "b"], [1.0, 0.5])
    return pipe


@pytest.fixture(scope="module")
def of_fused_weights(with_loras):
    """The prediction of the pipeline that is fused by diffusers before it is quantized."""
    pipe = copy.deepcopy(with_loras)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    return families.call(families.quantized(pipe.unet))


@pytest.mark.parametrize("fused", [False, True])
def test_a_pipeline_with_loras_is_quantized_as_it_stands(with_loras, of_fused_weights, fused):
    pipe = copy.deepcopy(with_loras)
    if fused:
        pipe.fuse_lora(components=["unet"])
    nearest = QuantizationConfig(refine=None)
    with pytest.warns(UserWarning) as told:
        quantize(pipe, nearest, calibration=lambda pipe: families.call(pipe.unet))
    assert {str(each.message) for each in told} >= {
        "LoRAs of UNet2DConditionModel were merged into its weights: a, b",
        "LoRAs of UNet2DConditionModel were removed: not in use: c",
    }
    assert pipe.get_list_adapters() == {}
    pack(pipe)
    assert torch.equal(families.call(pipe.unet), of_fused_weights)


def test_a_calibration_with_loras_is_one_of_their_network(with_loras, of_fused_weights):
    unet = copy.deepcopy(with_loras.unet)
    calibration = calibrate(unet, calls=families.call)
    found = estimate(unet, QuantizationConfig(refine=None), calls=families.call)
    assert sum(group.layers for group in found.groups) == len(calibration.inputs)
    assert torch.equal(families.call(unet), families.call(with_loras.unet))
    quantize(unet, QuantizationConfig(refine=None), calibration=calibration)
    pack(unet)
    assert torch.equal(families.call(unet), of_fused_weights)


def test_loras_stay_where_a_quantization_fails(with_loras):
    pipe = copy.deepcopy(with_loras)
    before = families.call(pipe.unet)
    with pytest.raises(InputError, match="calibration must be given"):
        quantize(pipe, QuantizationConfig(refine=None))
    assert pipe.get_list_adapters() == {"unet": ["a", "b", "c"]}
    assert pipe.get_active_adapters() == ["a", "b"]
    assert torch.equal(families.call(pipe.unet), before)


def test_a_state_is_that_of_the_weights_with_their_loras(with_loras, of_fused_weights, tmp_path):
    nearest = QuantizationConfig(refine=None)
    for _ in range(2):
        unet = copy.deepcopy(with_loras.unet)
        quantize(unet, nearest, calibration=families.call, state=tmp_path)
        pack(unet)
        assert torch.equal(families.call(unet), of_fused_weights)
    other = copy.deepcopy(with_loras.unet)
    other.set_adapters(["a"])
    with pytest.raises(InputError, match="weights"):
        quantize(other, nearest, calibration=families.call, state=tmp_path)
    assert other.active_adapters() == ["a"]
