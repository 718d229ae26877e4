import copy
import statistics

import pytest
import torch

from msfp import FinetuneConfig, InputError, finetune, seal
from msfp.adaround import adaround
from msfp.config import RefinementConfig
from msfp.evaluate import noise_errors
from msfp.fine_tuning import draw_batch
from msfp.layers import quantized_layers
from msfp.paired import paired
from msfp.refinement import refine

SMALL = {"samples": 24, "positions": 2048}


@pytest.fixture
def refined(quantized, trajectories):
    """A function that gives a refined open denoiser."""

    def make(**config):
        denoiser = quantized()[0].unet
        refine(denoiser, trajectories, RefinementConfig(**(SMALL | config)))
        return denoiser

    return make


def mean_error(denoiser, trajectories):
    return statistics.mean(noise_errors(denoiser, trajectories))


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround"])
def test_weights_become_values_of_their_grids_and_are_sealed_as_they_are(
    refined, rounding, monkeypatch
):
    monkeypatch.setitem(adaround.__kwdefaults__, "steps", 3)
    denoiser = refined(rounding=rounding, samples=2)
    before = {name: layer.weight.clone() for name, layer in quantized_layers(denoiser).items()}
    seal(denoiser)
    for name, layer in quantized_layers(denoiser).items():
        assert torch.equal(layer.entries[0], before[name])


def test_each_step_lowers_the_noise_error(quantized, refined, trajectories):
    errors = [
        mean_error(denoiser, trajectories)
        for denoiser in (
            quantized()[0].unet,
            refined(match_inputs=False, correct_bias="none"),
            refined(),
        )
    ]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.85 * errors[1]


def test_the_mean_output_of_every_layer_is_that_of_full_precision(quantized, trajectories):
    denoiser = quantized()[0].unet
    config = RefinementConfig(rounding="nearest", samples=16, positions=10**6)
    full, inputs = {}, {}

    def visit(meeting):
        full[meeting.name], inputs[meeting.name] = meeting.outputs, meeting.inputs

    generator = torch.Generator().manual_seed(config.seed)
    step, trajectory = draw_batch(*trajectories.samples.shape[:2], config.samples, generator)
    sample, timestep = trajectories.samples[step, trajectory], trajectories.timesteps[step]
    with paired(denoiser, visit), torch.no_grad():
        denoiser(torch.cat([sample] * 2), torch.cat([timestep] * 2))
    refine(denoiser, trajectories, config)
    layer = denoiser.conv_in  # reads the samples themselves
    with torch.no_grad():
        mean = layer(inputs["conv_in"]).mean(dim=(0, 2, 3))
    torch.testing.assert_close(mean, full["conv_in"].mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_it_is_reproduced_by_its_seed(refined):
    first, second, other = (refined(seed=seed, samples=8).conv_out for seed in (0, 0, 1))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert not torch.equal(first.weight, other.weight)


def test_the_full_precision_model_is_left_alone(refined, reference):
    before = copy.deepcopy(reference.unet.state_dict())
    refined(samples=4)
    assert all(torch.equal(before[k], v) for k, v in reference.unet.state_dict().items())


def test_without_bias_correction_biases_stay(refined, reference):
    denoiser = refined(correct_bias="none", samples=4)
    for name, layer in quantized_layers(denoiser).items():
        assert torch.equal(layer.bias, reference.unet.get_submodule(name).bias)


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
        for name, layer in quantized_layers(after).items()
        if not torch.equal(layer.bias, reference.unet.get_submodule(name).bias)
    ]
    assert changed == ["conv_out"]


def test_fine_tuning_ends_better_from_refined_weights(refined, quantized, trajectories):
    config = FinetuneConfig(rank=2, steps=6, batch=8)
    errors = []
    for denoiser in (quantized()[0].unet, refined()):
        finetune(denoiser, trajectories, config)
        errors.append(mean_error(denoiser, trajectories))
    assert errors[1] < 0.8 * errors[0]


def test_progress_names_every_layer(quantized, trajectories):
    denoiser, seen = quantized()[0].unet, []
    refine(denoiser, trajectories, RefinementConfig(samples=2), progress=seen.append)
    assert sorted(seen) == sorted(quantized_layers(denoiser))


def test_a_plain_or_a_sealed_denoiser_is_refused(reference, quantized, trajectories):
    sealed = quantized()[0].unet
    seal(sealed)
    for denoiser in (reference.unet, sealed):
        with pytest.raises(InputError, match="must have been quantized and not yet sealed"):
            refine(denoiser, trajectories, RefinementConfig())


@pytest.mark.parametrize("scales", ["diagonal", "output"])
def test_scales_can_be_searched_by_the_output(quantized, refined, scales):
    plain, searched = quantized()[0].unet, refined(samples=2, scales=scales)
    pairs = zip(*(quantized_layers(d).values() for d in (plain, searched)), strict=True)
    changed = 0
    for before, after in pairs:
        assert after.weight_quantizer.scale.shape == before.weight_quantizer.scale.shape
        assert after.weight_quantizer.format.bits == before.weight_quantizer.format.bits
        assert torch.equal(after.weight_quantizer(after.weight), after.weight)
        changed += not torch.equal(after.weight_quantizer.scale, before.weight_quantizer.scale)
    assert changed > 50


def test_integers_stay_integers_when_scales_are_searched(quantized, trajectories):
    denoiser = quantized(scheme="int_mse")[0].unet
    refine(denoiser, trajectories, RefinementConfig(samples=2, scales="diagonal"))
    assert denoiser.conv_in.weight_quantizer.format.exponent_bits == 0


def test_concatenated_inputs_are_split_on_request(refined):
    denoiser = refined(samples=2, split_inputs=True)
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
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value, allowed):
    with pytest.raises(InputError, match=rf"{name} must be {allowed}.*not {value!r}"):
        RefinementConfig(**{name: value})
