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
    pack,
    quantize,
    record_trajectories,
)
from msfp.config import RefinementConfig
from msfp.evaluation.prediction_errors import noise_errors
from msfp.layers.base import quantized_layers
from msfp.layers.trainable import trainable_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.ptq.refinement import _column_parts, refine
from msfp.ptq.rounding.methods import ROUNDINGS
from msfp.ptq.side_by_side import visit_layers

CALIBRATING = ("calibrating", 1, 1)
PURE = {"split_inputs": False, "branch_rank": 0}
SMALL = {"samples": 16, "positions": 2048, "split_inputs": False, "branch_rank": 0}


@pytest.fixture(scope="module")
def paths():
    """Inputs and outputs of a tiny denoiser of random weights."""
    return record_trajectories(families.pipeline("unet", None), calls=families.images)


@pytest.fixture(scope="module")
def tiny(paths):
    """A function that gives the tiny denoiser quantized, trainable, and refined by a config."""
    made = {}

    def make(refinement=None, **config):
        if repr(config) not in made:
            made[repr(config)] = families.make("unet")
            request = QuantizationConfig(**config, refine=None)
            quantize(made[repr(config)], request, calibration=families.call)
        denoiser = copy.deepcopy(made[repr(config)])
        if refinement is not None:
            refine(denoiser, RefinementConfig(**refinement), trajectories=paths)
        return denoiser

    return make


@pytest.fixture(scope="module")
def refined(quantized, trajectories):
    """A function that gives the refined trainable denoiser of digits."""
    made = {}

    def make(**config):
        if repr(config) not in made:
            denoiser = quantized()[0].unet
            refine(denoiser, RefinementConfig(**(SMALL | config)), trajectories=trajectories)
            made[repr(config)] = denoiser
        return copy.deepcopy(made[repr(config)])

    return make


def mean_error(denoiser, trajectories):
    return statistics.mean(noise_errors(denoiser, trajectories=trajectories))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_weights_become_values_of_their_grids_and_are_packed_as_they_are(paths, rounding, dtype):
    denoiser = families.make("unet").to(dtype)
    paths = replace(paths, samples=paths.samples.to(dtype))
    quantize(denoiser, QuantizationConfig(refine=None), calibration=families.call)
    refine(denoiser, RefinementConfig(rounding=rounding), trajectories=paths)
    layers = trainable_layers(denoiser)
    for layer in layers.values():
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.quantized_weight(), layer.weight)
    pack(denoiser)
    for name, layer in quantized_layers(denoiser).items():
        assert torch.equal(layer.quantized_weight(), layers[name].weight)


@pytest.mark.slow
def test_each_step_lowers_the_noise_error(quantized, trajectories):
    errors = []
    for config in (
        None,
        {"match_inputs": False, "correct_bias": "none"},
        {},
        {"split_inputs": True, "branch_rank": 16},
    ):
        pipe, _ = quantized(include=["down_blocks"], first_layers=[], last_layers=[])
        if config is not None:
            refine(pipe, RefinementConfig(**PURE | config), trajectories=trajectories)
        errors.append(mean_error(pipe.unet, trajectories))
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.85 * errors[1]
    assert errors[3] < 0.4 * errors[2]


@pytest.mark.parametrize("family", families.SOME)
def test_a_denoiser_of_any_family_comes_closer_to_full_precision(family, tmp_path):
    pipe = families.pipeline(family, tmp_path)
    paths = record_trajectories(pipe, calls=families.images)
    quantize(pipe, QuantizationConfig(refine=None), calibration=families.images)
    errors = [mean_error(denoiser_of(pipe), paths)]
    refine(pipe, RefinementConfig(samples=32), trajectories=paths)
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
    errors, told = [], []
    for refinement in (None, RefinementConfig(samples=32, rotate_inputs=False)):
        network = Network()
        paths = record_trajectories(network, calls=call)
        config = QuantizationConfig(end_bits=4, refine=refinement)
        quantize(network, config, calibration=call, progress=lambda *facts: told.append(facts))
        errors.append(mean_error(network, paths))
    assert 0 < errors[1] < 0.9 * errors[0]
    plain = Network()
    changed = [
        name
        for name, layer in trainable_layers(network).items()
        if not torch.equal(layer.weight, plain.get_submodule(name).weight)
    ]
    # What does not read samples has nothing to be refined by.
    assert changed == ["inner", "again", "out"]
    searching = [("searching", done, 4) for done in (1, 2, 3, 4)]
    refining = [("refining", done, 4) for done in (1, 2, 3, 4)]
    branching = [("adding branches", done, 4) for done in (1, 2, 3, 4)]
    assert told == [CALIBRATING, *searching, CALIBRATING, *searching, *branching, *refining]
    again = Network()
    quantize(again, replace(config, refine=None), calibration=call)
    with pytest.warns(UserWarning, match="not refined.*: queries"):
        assert refine(again, config.refine, trajectories=paths) == changed


@pytest.mark.slow
def test_the_mean_output_of_every_layer_is_that_of_full_precision(quantized, trajectories):
    denoiser = quantized()[0].unet
    config = RefinementConfig(rounding="nearest", samples=16, positions=10**6)
    full, inputs = {}, {}

    def note(visit):
        ((inputs[visit.name], full[visit.name]),) = visit.parts()

    generator = torch.Generator().manual_seed(config.seed)
    step, row = spread_batch(*trajectories.samples.shape[:2], config.samples, generator)
    visit_layers(denoiser, trajectories, step, row, note)
    refine(denoiser, config, trajectories=trajectories)
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


@pytest.mark.slow
def test_the_full_precision_model_is_left_alone(reference, refined):
    before = copy.deepcopy(reference.unet.state_dict())
    refined()
    assert all(torch.equal(before[k], v) for k, v in reference.unet.state_dict().items())


def test_without_bias_correction_biases_stay(tiny):
    plain = families.make("unet")
    for name, layer in trainable_layers(tiny({"correct_bias": "none"})).items():
        bias = plain.get_submodule(name).bias
        assert layer.bias is bias is None or torch.equal(layer.bias, bias)


@pytest.mark.slow
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
        for name, layer in trainable_layers(after).items()
        if not torch.equal(layer.bias, reference.unet.get_submodule(name).bias)
    ]
    assert changed == ["conv_out"]


@pytest.mark.slow
def test_fine_tuning_ends_better_from_refined_weights(refined, quantized, trajectories):
    config = FinetuneConfig(rank=2, steps=3, batch=8)
    errors = []
    for denoiser in (quantized()[0].unet, refined()):
        finetune(denoiser, config, trajectories=trajectories)
        errors.append(mean_error(denoiser, trajectories))
    assert errors[1] < 0.9 * errors[0]


def test_progress_is_told_of_every_layer_and_their_names_are_returned(tiny, paths):
    denoiser, told = tiny(), []
    names = refine(
        denoiser,
        RefinementConfig(),
        trajectories=paths,
        progress=lambda *facts: told.append(facts),
    )
    assert names == list(trainable_layers(denoiser))
    assert told == [
        (stage, done + 1, len(names))
        for stage in ("adding branches", "refining")
        for done in range(len(names))
    ]


def test_a_plain_or_a_packed_denoiser_is_refused(tiny, paths):
    packed = tiny()
    pack(packed)
    for denoiser in (families.make("unet"), packed):
        with pytest.raises(InputError, match="must have been quantized and not yet packed"):
            refine(denoiser, RefinementConfig(), trajectories=paths)


def test_numbers_that_are_not_finite_are_refused_by_the_name_of_the_layer(tiny, paths):
    samples = paths.samples.clone()
    samples[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="the input of layer 'conv_in' is not finite"):
        refine(tiny(), RefinementConfig(), trajectories=replace(paths, samples=samples))


def test_damping_is_raised_for_features_that_depend_on_each_other_with_a_warning(tiny, paths):
    samples = 1000 * torch.ones_like(paths.samples)
    few = RefinementConfig(damping=1e-6, samples=1)
    denoiser = tiny()
    with pytest.warns(UserWarning, match=r"\d+ layers .* damping was raised from 1e-06 to"):
        names = refine(denoiser, few, trajectories=replace(paths, samples=samples))
    assert names == list(trainable_layers(denoiser))
    assert all(layer.weight.isfinite().all() for layer in trainable_layers(denoiser).values())


def formats_of(denoiser):
    return {name: str(layer.formats.weight) for name, layer in trainable_layers(denoiser).items()}


def test_the_config_that_is_saved_says_how_weights_were_refined(tiny, paths):
    denoiser, refinement = tiny(), RefinementConfig(**SMALL | {"branch_rank": 2})
    before = formats_of(denoiser)
    refine(denoiser, refinement, trajectories=paths)
    config = denoiser.hf_quantizer.quantization_config
    assert config.request.refine == denoiser.config.quantization_config.request.refine == refinement
    formats = formats_of(denoiser)
    assert formats != before  # those of what the branches leave of the weights
    assert {each.name: each.weight_format for each in config.summaries} == formats
    assert all(
        each.weight_sqnr == each.weight_choices[each.weight_format] for each in config.summaries
    )


def test_what_is_no_config_and_no_path_is_refused(tiny, paths):
    with pytest.raises(InputError, match="config must be of the type RefinementConfig, not dict"):
        refine(tiny(), {"samples": 1}, trajectories=paths)
    with pytest.raises(InputError, match="trajectories must be of the type Trajectories, not list"):
        refine(tiny(), RefinementConfig(), trajectories=[])


def test_integers_stay_integers_when_grids_are_searched_again(tiny):
    refinement = {"branch_rank": 1, "split_inputs": True}
    denoiser = tiny(refinement, scheme="int_mse")
    for layer in trainable_layers(denoiser).values():
        assert layer.weight_quantizer.format.exponent_bits == 0
        assert layer.input_quantizer.format.exponent_bits == 0
    assert any(layer.input_quantizer.scale.dim() for layer in trainable_layers(denoiser).values())


@pytest.mark.slow
def test_concatenated_inputs_are_split_on_request(quantized, trajectories):
    denoiser = quantized()[0].unet
    config = RefinementConfig(samples=2, positions=64, split_inputs=True, branch_rank=0)
    refine(denoiser, config, trajectories=trajectories)
    assert denoiser.up_blocks[0].resnets[0].conv_shortcut.input_quantizer.scale.shape == (192, 1, 1)
    assert denoiser.down_blocks[1].resnets[0].conv_shortcut.input_quantizer.scale.shape == ()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("rounding", "up", "one of .*gptq"),
        ("correct_bias", "first", "one of .*last"),
        ("samples", 0, "between 1"),
        ("damping", 0, "between"),
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
def test_as_many_samples_are_used_as_their_size_allows(shape, most, tiny, monkeypatch):
    rows = torch.zeros(1).expand(2, 200, *shape)
    given = Trajectories(torch.tensor([9, 1]), rows, rows)
    used = []
    monkeypatch.setattr("msfp.ptq.refinement.check_forwards", lambda *_: None)
    monkeypatch.setattr(
        "msfp.ptq.refinement.visit_layers", lambda *words, **_: used.append(len(words[2]))
    )
    config = RefinementConfig(branch_rank=0, split_inputs=False, rotate_inputs=False)
    refine(tiny(), config, trajectories=given)
    refine(tiny(), replace(config, samples=5), trajectories=given)
    assert used == [most, 5]


class Shifted(nn.Module):
    """Two layers, the second of which adds much."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(6, 32), nn.Linear(32, 6)
        with torch.no_grad():
            self.out.bias += 5

    def forward(self, x):
        return self.out(self.inner(x).relu())


def shifted_call(network):
    return network(torch.randn(64, 8, 6, generator=torch.Generator().manual_seed(1)))


def refined_shifted(**refine):
    network, paths = Shifted(), record_trajectories(Shifted(), calls=shifted_call)
    config = QuantizationConfig(end_bits=4, refine=RefinementConfig(branch_rank=0, **refine))
    quantize(network, config, calibration=shifted_call, trajectories=paths)
    return network, statistics.mean(noise_errors(network, trajectories=paths))


def test_a_bias_that_stays_is_not_added_by_the_weights_again():
    errors = {each: refined_shifted(correct_bias=each)[1] for each in ("all", "last", "none")}
    assert errors["none"] < 1.1 * errors["all"]
    assert errors["last"] < 1.1 * errors["all"]


def test_columns_in_parts_are_refined_about_as_well_as_together(monkeypatch):
    together, error = refined_shifted()
    monkeypatch.setattr("msfp.ptq.refinement.MOST_COLUMNS", 12)
    parts, error_in_parts = refined_shifted()
    assert [part.stop for part in _column_parts(torch.zeros(1, 6, 32))] == [11, 22, 32]
    assert not torch.equal(together.out.weight, parts.out.weight)
    nearest = Shifted()
    quantize(nearest, QuantizationConfig(end_bits=4, refine=None), calibration=shifted_call)
    paths = record_trajectories(Shifted(), calls=shifted_call)
    error_of_nearest = statistics.mean(noise_errors(nearest, trajectories=paths))
    assert error_in_parts - error < 0.2 * (error_of_nearest - error)


@pytest.mark.slow
def test_offloading_changes_no_bit(tmp_path, monkeypatch, paths):
    monkeypatch.setattr("msfp.support.paging.SMALL", 64)
    states = []
    for offload in (False, True):
        pipe = families.pipeline("unet", None)
        config = QuantizationConfig(refine=RefinementConfig(samples=16, branch_rank=2))
        given = {"trajectories": paths, "state": tmp_path if offload else None}
        quantize(pipe, config, calibration=families.images, offload=offload, **given)
        pack(pipe)
        states.append(pipe.unet.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    kept = {file.name for file in tmp_path.iterdir()}
    assert kept == {"searched", "branches", "refined", "calibration.safetensors"}


def test_an_error_with_offloaded_weights_leaves_the_denoiser_as_it_was(monkeypatch, paths):
    monkeypatch.setattr("msfp.support.paging.SMALL", 64)
    pipe = families.pipeline("unet", None)
    before = copy.deepcopy(pipe.unet.state_dict())

    def fail(stage, done, _total, _note="", /):
        if (stage, done) == ("refining", 20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(pipe, calibration=families.images, trajectories=paths, offload=True, progress=fail)
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
