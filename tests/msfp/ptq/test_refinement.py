import copy
import statistics
from dataclasses import replace

import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from msfp import (
    FinetuneConfig,
    InputError,
    QuantizationConfig,
    finetune,
    quantize,
    record_trajectories,
    seal,
)
from msfp.config import RefinementConfig
from msfp.evaluation.metrics import noise_errors
from msfp.layers.base import quantized_layers
from msfp.layers.trainable import open_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.ptq.refinement import refine
from msfp.ptq.rounding.adaround import adaround
from msfp.ptq.side_by_side import meet_layers

SMALL = {"samples": 16, "positions": 2048, "split_inputs": False, "branch_rank": 0}


@pytest.fixture(scope="module")
def paths():
    """What a tiny denoiser of random weights was asked and said."""
    return record_trajectories(families.pipeline("unet", None), families.images)


@pytest.fixture(scope="module")
def tiny(paths):
    """A function that gives the tiny denoiser quantized, open, and refined by a config."""

    def make(refinement=None, **config):
        denoiser = families.make("unet")
        request = QuantizationConfig(**config, refine=None)
        quantize(denoiser, request, calibration=families.call)
        if refinement is not None:
            refine(denoiser, paths, RefinementConfig(**refinement))
        return denoiser

    return make


@pytest.fixture(scope="module")
def refined(quantized, trajectories):
    """A function that gives the refined open denoiser of digits."""
    made = {}

    def make(**config):
        if repr(config) not in made:
            denoiser = quantized()[0].unet
            refine(denoiser, trajectories, RefinementConfig(**(SMALL | config)))
            made[repr(config)] = denoiser
        return copy.deepcopy(made[repr(config)])

    return make


def mean_error(denoiser, trajectories):
    return statistics.mean(noise_errors(denoiser, trajectories))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround"])
def test_weights_become_values_of_their_grids_and_are_sealed_as_they_are(
    paths, rounding, dtype, monkeypatch
):
    monkeypatch.setitem(adaround.__kwdefaults__, "steps", 3)
    denoiser = families.make("unet").to(dtype)
    paths = replace(paths, samples=paths.samples.to(dtype))
    quantize(denoiser, QuantizationConfig(refine=None), calibration=families.call)
    refine(denoiser, paths, RefinementConfig(rounding=rounding))
    layers = open_layers(denoiser)
    for layer in layers.values():
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.quantized_weight(), layer.weight)
    seal(denoiser)
    for name, layer in quantized_layers(denoiser).items():
        assert torch.equal(layer.weight, layers[name].weight)


def test_each_step_lowers_the_noise_error(quantized, refined, trajectories):
    errors = [
        mean_error(denoiser, trajectories)
        for denoiser in (
            quantized()[0].unet,
            refined(match_inputs=False, correct_bias="none"),
            refined(),
            refined(split_inputs=True, branch_rank=16),
        )
    ]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.85 * errors[1]
    assert errors[3] < 0.4 * errors[2]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_denoiser_of_any_family_comes_closer_to_full_precision(family, tmp_path):
    paths = record_trajectories(families.pipeline(family, tmp_path), families.images)
    errors = []
    for refinement in (None, RefinementConfig(samples=32)):
        pipe = families.pipeline(family, tmp_path)
        quantize(pipe, QuantizationConfig(refine=refinement), calibration=families.images)
        errors.append(mean_error(denoiser_of(pipe), paths))
    assert 0 < errors[1] < 0.8 * errors[0]


def test_convolutions_along_one_dimension_are_refined_and_layers_that_run_twice_once():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Conv1d(4, 16, 3, padding=1, stride=2)
            self.again = nn.Conv1d(16, 16, 3, padding="same", groups=2)
            self.queries = nn.Linear(16, 16)
            self.learned = nn.Parameter(torch.randn(3, 16))
            self.out = nn.Linear(16, 4)

        def forward(self, x, timestep):
            hidden = F.silu(self.again(F.silu(self.again(self.inner(x)))))
            scores = (self.queries(self.learned) @ hidden).softmax(dim=1)
            return self.out(hidden.mT) * timestep.view(-1, 1, 1) + scores.mean()

    def call(network):
        return network(torch.randn(8, 4, 32, generator=torch.Generator().manual_seed(0)), time)

    time = torch.ones(1).expand(8)
    errors, met = [], []
    for refinement in (None, RefinementConfig(samples=32)):
        network = Network()
        paths = record_trajectories(network, call)
        config = QuantizationConfig(first_last=4, refine=refinement)
        quantize(network, config, calibration=call, progress=met.append)
        errors.append(mean_error(network, paths))
    assert 0 < errors[1] < 0.9 * errors[0]
    # Searched twice and refined once; what does not read samples has nothing to be refined by.
    assert {name: met.count(name) for name in met} == {
        "inner": 3, "again": 3, "queries": 2, "out": 3,
    }  # fmt: skip


def test_the_mean_output_of_every_layer_is_that_of_full_precision(quantized, trajectories):
    denoiser = quantized()[0].unet
    config = RefinementConfig(rounding="nearest", samples=16, positions=10**6)
    full, inputs = {}, {}

    def visit(meeting):
        full[meeting.name], inputs[meeting.name] = meeting.outputs, meeting.inputs

    generator = torch.Generator().manual_seed(config.seed)
    step, row = spread_batch(*trajectories.samples.shape[:2], config.samples, generator)
    meet_layers(denoiser, trajectories, step, row, visit)
    refine(denoiser, trajectories, config)
    layer = denoiser.conv_in  # reads the samples themselves
    with torch.no_grad():
        mean = layer(inputs["conv_in"]).mean(dim=(0, 2, 3))
    torch.testing.assert_close(mean, full["conv_in"].mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_it_is_reproduced_by_its_seed(tiny):
    drawn = {"positions": 16}
    first, second, other = (tiny(drawn | {"seed": seed}).conv_out for seed in (0, 0, 1))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert not torch.equal(first.weight, other.weight)


def test_the_full_precision_model_is_left_alone(reference, refined):
    before = copy.deepcopy(reference.unet.state_dict())
    refined()
    assert all(torch.equal(before[k], v) for k, v in reference.unet.state_dict().items())


def test_without_bias_correction_biases_stay(tiny):
    plain = families.make("unet")
    for name, layer in open_layers(tiny({"correct_bias": "none"})).items():
        bias = plain.get_submodule(name).bias
        assert layer.bias is bias is None or torch.equal(layer.bias, bias)


def test_the_last_bias_alone_takes_the_mean_shift_from_the_prediction(
    refined, reference, trajectories
):
    plain = {"rounding": "nearest", "match_inputs": False}
    before, after = (refined(correct_bias=which, **plain) for which in ("none", "last"))
    shifts = []
    with torch.no_grad():
        for denoiser in (before, after):
            predictions = denoiser(trajectories.samples[1], trajectories.timesteps[1]).sample
            shifts.append((predictions - trajectories.predictions[1]).mean().abs().item())
    assert shifts[1] < 0.5 * shifts[0]
    changed = [
        name
        for name, layer in open_layers(after).items()
        if not torch.equal(layer.bias, reference.unet.get_submodule(name).bias)
    ]
    assert changed == ["conv_out"]


def test_fine_tuning_ends_better_from_refined_weights(refined, quantized, trajectories):
    config = FinetuneConfig(rank=2, steps=3, batch=8)
    errors = []
    for denoiser in (quantized()[0].unet, refined()):
        finetune(denoiser, trajectories, config)
        errors.append(mean_error(denoiser, trajectories))
    assert errors[1] < 0.9 * errors[0]


def test_progress_names_every_layer(tiny, paths):
    denoiser, seen = tiny(), []
    refine(denoiser, paths, RefinementConfig(), progress=seen.append)
    assert sorted(seen) == sorted(open_layers(denoiser))


def test_a_plain_or_a_sealed_denoiser_is_refused(tiny, paths):
    sealed = tiny()
    seal(sealed)
    for denoiser in (families.make("unet"), sealed):
        with pytest.raises(InputError, match="must have been quantized and not yet sealed"):
            refine(denoiser, paths, RefinementConfig())


def test_numbers_that_are_not_finite_are_refused_by_the_name_of_the_layer(tiny, paths):
    samples = paths.samples.clone()
    samples[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="the input of layer 'conv_in' is not finite"):
        refine(tiny(), replace(paths, samples=samples), RefinementConfig())


def test_features_that_depend_on_each_other_are_named_where_damping_is_too_small(tiny, paths):
    samples = 1000 * torch.ones_like(paths.samples)
    few = RefinementConfig(damping=1e-6, samples=1)
    message = r"damping must be larger than 1e-06: the features that layer 'conv_in' reads"
    with pytest.raises(InputError, match=message):
        refine(tiny(), replace(paths, samples=samples), few)


def test_the_config_that_is_saved_says_how_weights_were_refined(tiny, paths):
    denoiser, refinement = tiny(), RefinementConfig(**SMALL, scales="output")
    refine(denoiser, paths, refinement)
    config = denoiser.hf_quantizer.quantization_config
    assert config.request.refine == denoiser.config.quantization_config.request.refine == refinement
    formats = {name: str(layer.formats.weight) for name, layer in open_layers(denoiser).items()}
    assert {each.name: each.weight_format for each in config.summaries} == formats
    assert all(
        each.weight_sqnr == each.weight_choices[each.weight_format] for each in config.summaries
    )


def test_what_is_no_config_and_no_path_is_refused(tiny, paths):
    with pytest.raises(InputError, match="config must be of the type RefinementConfig, not dict"):
        refine(tiny(), paths, {"sweeps": 1})
    with pytest.raises(InputError, match="trajectories must be of the type Trajectories, not list"):
        refine(tiny(), [], RefinementConfig())


@pytest.mark.parametrize("scales", ["diagonal", "output"])
def test_scales_can_be_searched_by_the_output(tiny, scales):
    plain, searched = tiny(), tiny({"scales": scales})
    pairs = zip(*(open_layers(d).values() for d in (plain, searched)), strict=True)
    changed = 0
    for before, after in pairs:
        assert after.weight_quantizer.scale.shape == before.weight_quantizer.scale.shape
        assert after.weight_quantizer.format.bits == before.weight_quantizer.format.bits
        assert torch.equal(after.weight_quantizer(after.weight), after.weight)
        changed += not torch.equal(after.weight_quantizer.scale, before.weight_quantizer.scale)
    assert changed > len(open_layers(plain)) / 2


def test_integers_stay_integers_when_scales_are_searched(tiny):
    refinement = {"scales": "diagonal", "branch_rank": 1, "split_inputs": True}
    denoiser = tiny(refinement, scheme="int_mse")
    for layer in open_layers(denoiser).values():
        assert layer.weight_quantizer.format.exponent_bits == 0
        assert layer.input_quantizer.format.exponent_bits == 0
    assert any(layer.input_quantizer.scale.dim() for layer in open_layers(denoiser).values())


def test_concatenated_inputs_are_split_on_request(quantized, trajectories):
    denoiser = quantized()[0].unet
    refine(denoiser, trajectories, RefinementConfig(samples=2, split_inputs=True))
    assert denoiser.up_blocks[0].resnets[0].conv_shortcut.input_quantizer.scale.shape == (192, 1, 1)
    assert denoiser.down_blocks[1].resnets[0].conv_shortcut.input_quantizer.scale.shape == ()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("rounding", "up", "one of .*gptq"),
        ("scales", "all", "one of .*output"),
        ("correct_bias", "first", "one of .*last"),
        ("samples", 0, "between 1"),
        ("damping", 0, "between"),
        ("sweeps", -1, "between 0"),
        ("positions", 0, "between 1"),
        ("branch_rank", 257, "between 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value, allowed):
    with pytest.raises(InputError, match=rf"{name} must be {allowed}.*not {value!r}"):
        RefinementConfig(**{name: value})


@pytest.mark.parametrize(
    ("shape", "most"),
    [((1, 16, 16), 256), ((3, 32, 32), 256), ((3, 64, 64), 85), ((4, 64, 64), 64)],
)
def test_as_many_samples_are_met_as_their_size_allows(shape, most, tiny, monkeypatch):
    rows = torch.zeros(1).expand(2, 200, *shape)
    given = Trajectories(torch.tensor([9, 1]), rows, rows)
    met = []
    monkeypatch.setattr("msfp.ptq.refinement.meet_layers", lambda *words: met.append(len(words[2])))
    config = RefinementConfig(branch_rank=0, split_inputs=False)
    refine(tiny(), given, config)
    refine(tiny(), given, replace(config, samples=5))
    assert met == [most, 5]
