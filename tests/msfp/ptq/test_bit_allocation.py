"""Budgets: what they choose, that they are kept, and that they are refused by name."""

import copy
import statistics
from collections import Counter
from dataclasses import replace
from itertools import product

import families
import pytest
import torch
from torch import nn

import msfp
from msfp import InputError, QuantizationConfig, RefinementConfig, pack, quantize
from msfp.checkpoint.integrity import as_stored
from msfp.checkpoint.io import packed_size
from msfp.layers.base import quantized_layers
from msfp.layers.selection import quantizable_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.ptq.bit_allocation import Allocation, Option, _Budget, hull
from msfp.ptq.side_by_side import SharedValuesError
from msfp.ptq.stored_size import layer_bytes
from msfp.support import offloading

REFINE = RefinementConfig(samples=8)
CALLS = [families.images]


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msfp.ptq.sensitivity.SAMPLES", 5)
        yield


@pytest.fixture(scope="module")
def quantized():
    """A pipeline that was quantized with a budget."""
    pipe = families.pipeline("unet", None)
    config = QuantizationConfig(refine=REFINE, budget=6.0)
    quantize(pipe, config, calibration=CALLS)
    return pipe


def counted_bytes(network):
    """Bytes of each packed layer in the file, without bias and scales of inputs."""
    found = Counter()
    for name, each in as_stored(network.state_dict()).items():
        layer, _, key = name.rpartition(".")
        if key != "bias" and "input" not in key:
            found[layer] += each.nbytes
    return found


def test_a_budget_is_used_but_not_exceeded(quantized):
    pipe = copy.deepcopy(quantized)
    pack(pipe)
    plain = quantizable_layers(denoiser_of(families.pipeline("unet", None)))
    layers, found = quantized_layers(pipe.unet), counted_bytes(pipe.unet)
    weights = sum(plain[name].weight.numel() for name in layers)
    assert 5.8 < 8 * sum(found[name] for name in layers) / weights <= 6.0


def test_the_choice_is_among_the_overrides_of_the_recorded_config(quantized):
    layers = quantized_layers(quantized.unet)
    config = quantized.unet.config.quantization_config
    overrides = config.to_dict()["overrides"]
    assert overrides.keys() == layers.keys() - {"conv_in", "conv_out"}
    for name, each in overrides.items():
        formats = layers[name].formats
        assert (formats.weight.bits, formats.branch_rank) == tuple(each.values())
    assert len({tuple(each.values()) for each in overrides.values()}) > 3


def test_the_same_request_again_needs_no_measurement():
    stages = []
    pipe = families.pipeline("unet", None)
    given = {"weight_bits": 6, "branch_rank": 0}
    config = QuantizationConfig(refine=REFINE, budget=7.0, overrides={"*": given})
    quantize(pipe, config, calibration=CALLS, progress=lambda stage, *_: stages.append(stage))
    assert "measuring" not in stages
    assert {each.formats.weight.bits for each in quantized_layers(pipe.unet).values()} == {6}


def test_a_size_is_that_of_the_file():
    pipe = families.pipeline("unet", None)
    quantize(pipe, QuantizationConfig(refine=REFINE, budget="40kB"), calibration=CALLS)
    pack(pipe)
    tensors = pipe.unet.state_dict()
    inputs = sum(each.nbytes for name, each in tensors.items() if "input" in name)
    assert 39_000 < packed_size(pipe.unet) - inputs <= 40_000


def test_other_overrides_of_a_layer_stay():
    found = Allocation({"a": (6, 8)}, 5.0, 20.0, [], {})
    config = QuantizationConfig(budget=5, overrides={"a": {"activation_bits": 8}})
    wanted = {"activation_bits": 8, "weight_bits": 6, "branch_rank": 8}
    assert found.apply(config).overrides == {"a": wanted}


@pytest.mark.slow
def test_a_state_keeps_what_was_measured(tmp_path, quantized):
    def interrupt(stage, done, _total, _note="", /):
        if (stage, done) == ("measuring", 3):
            raise KeyboardInterrupt

    config, counts = QuantizationConfig(refine=REFINE, budget=6.0), []
    with pytest.raises(KeyboardInterrupt):
        quantize(
            families.pipeline("unet", None), config, calibration=CALLS, state=tmp_path,
            progress=interrupt,
        )  # fmt: skip
    kept = [*(tmp_path / "sensitivity").iterdir()]
    assert len(kept) == 3
    pipe = families.pipeline("unet", None)
    quantize(pipe, config, calibration=CALLS, state=tmp_path, progress=lambda *_: counts.append(_))
    wanted = quantized.unet.state_dict()
    found = pipe.unet.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_without_refinement_no_layer_gets_a_branch():
    pipe = families.pipeline("unet", None)
    quantize(pipe, QuantizationConfig(refine=None, budget=5.0), calibration=CALLS)
    formats = [each.formats for each in quantized_layers(pipe.unet).values()]
    assert {each.branch_rank for each in formats} == {0}
    assert len({each.weight.bits for each in formats}) > 2


def test_branches_of_single_layers_are_set_by_overrides():
    pipe = families.pipeline("unet", None)
    name = "mid_block.resnets.0.conv1"
    config = QuantizationConfig(
        refine=replace(REFINE, branch_rank=2),
        overrides={
            name: {"branch_rank": 4},
            "up_blocks": {"branch_rank": 0},
            "conv_in": {"branch_rank": 1},
        },
    )
    with pytest.warns(UserWarning, match="1 layers get no branch .*8 bits.*: conv_in"):
        quantize(pipe, config, calibration=CALLS)
    layers = quantized_layers(pipe.unet)
    assert layers[name].formats.branch_rank == 4
    assert layers["mid_block.resnets.0.conv2"].formats.branch_rank == 2
    assert not any(
        each.formats.branch_rank for name, each in layers.items() if name.startswith("up_blocks")
    )


def test_steps_give_the_least_error_for_their_size():
    generator = torch.Generator().manual_seed(0)
    options = {
        name: [
            Option(4 + 3 * i + int(torch.randint(2, (), generator=generator)), error, 3, i)
            for i, error in enumerate(sorted(torch.rand(4, generator=generator).tolist())[::-1])
        ]
        for name in "abcd"
    }
    hulls = {name: hull(each) for name, each in options.items()}
    whole, seen = _Budget(hulls, 1, 0), []
    whole.spend(float("inf"), lambda: seen.append((whole.size, whole.error)))
    choices = list(product(*options.values()))
    for size, error in seen:
        least = min(
            sum(each.error for each in choice)
            for choice in choices
            if sum(each.size for each in choice) <= size
        )
        assert error == pytest.approx(least)


def test_bytes_of_a_layer_are_those_of_its_tensors(quantized):
    pipe = copy.deepcopy(quantized)
    pack(pipe)
    plain = quantizable_layers(denoiser_of(families.pipeline("unet", None)))
    found = counted_bytes(pipe.unet)
    for name, layer in quantized_layers(pipe.unet).items():
        formats = layer.formats
        assert found[name] == layer_bytes(plain[name], formats.weight.bits, formats.branch_rank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 2.5}, "budget must be between 3 and 32, not 2.5"),
        ({"budget": "much"}, "budget must be a size such as '500MB' or '1.5GB', not 'much'"),
        ({"budget": "0MB"}, "budget must be larger than 0, not '0MB'"),
        ({"budget": True}, "budget must be a number, not True"),
        ({"budget": 5, "scheme": "mx"}, "budget must be None with scheme 'mx', not 5"),
        ({"overrides": {"conv_in": {"branch_rank": -1}}}, "branch_rank must be between 0 and 256"),
    ],
)
def test_wrong_budgets_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        quantize(families.pipeline("unet", None), QuantizationConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 3.01}, r"budget must be at least .* bits for each weight .* not 3.01"),
        ({"budget": "3kB"}, r"budget must be at least .* MB for this denoiser, not '3kB'"),
        (
            {"refine": None, "overrides": {"conv_in": {"branch_rank": 4}}},
            "branch_rank of layer 'conv_in' must be 0 without refine, not 4",
        ),
    ],
)
def test_impossible_budgets_are_refused_before_the_first_call(options, message):
    called = []
    with pytest.raises(InputError, match=message):
        quantize(
            families.pipeline("unet", None), QuantizationConfig(**options),
            calibration=lambda pipe: called.append(pipe),
        )  # fmt: skip
    assert not called


def test_weights_that_wait_on_another_device_are_refused_before_the_first_call():
    pipe, called = families.pipeline("unet", None), []
    config = QuantizationConfig(refine=REFINE, budget=6)
    given = QuantizationConfig(
        refine=REFINE, budget=6, overrides={"*": {"weight_bits": 4, "branch_rank": 0}}
    )
    with offloading._moved(pipe.unet, torch.device("cpu")):
        with pytest.raises(InputError, match="budget needs the weights on the device that compute"):
            quantize(pipe, config, calibration=lambda pipe: called.append(pipe))
        assert not called
        quantize(pipe, given, calibration=CALLS)  # nothing is left to choose


def test_a_budget_does_without_branches_only_if_asked():
    def fail(*_args, **_keywords):
        raise SharedValuesError("cannot wait")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msfp.ptq.quantization.refine_kept", fail)
        pipe = families.pipeline("unet", None)
        with pytest.raises(SharedValuesError, match="cannot wait"):
            quantize(pipe, QuantizationConfig(budget=6), calibration=CALLS)
        assert not quantized_layers(pipe.unet)


def test_the_card_says_the_budget(quantized, tmp_path):
    pipe = copy.deepcopy(quantized)
    pack(pipe)
    msfp.save(pipe, tmp_path / "new")
    text = (tmp_path / "new" / "README.md").read_text()
    assert "budget of 6 bits for each weight" in text
    assert "ranks that the budget chose" in text


def test_a_budget_needs_calls():
    with pytest.raises(InputError, match="budget needs calls of the pipeline as calibration"):
        quantize(
            families.pipeline("unet", None), QuantizationConfig(activation_bits=None, budget=5.0)
        )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 16])
def test_a_budget_beats_the_same_choice_for_every_layer_at_equal_size(
    reference_dit, rank, monkeypatch
):
    """The shipped transformer: errors of predictions on held-out noise."""
    monkeypatch.setattr("msfp.ptq.sensitivity.SAMPLES", 32)
    pipe, calls, held_out = reference_dit
    errors, sizes = [], []
    for budget in (None, "size"):
        own, size = pipe(), f"{sizes[0] / 1e6} MB" if sizes else None
        refine = RefinementConfig(branch_rank=16 if budget else rank)
        quantize(own, QuantizationConfig(refine=refine, budget=size), calibration=calls)
        pack(own)
        sizes.append(packed_size(denoiser_of(own)))
        errors.append(statistics.mean(msfp.noise_errors(own, trajectories=held_out)))
    assert sizes[1] < 1.003 * sizes[0]  # scales of inputs are not counted
    assert errors[1] < {0: 0.5, 16: 0.9}[rank] * errors[0]


@pytest.fixture(scope="module")
def reference_dit():
    def pipe():
        return msfp.reference_pipeline("digits-transformer")

    sampler = msfp.Sampler(steps=10, batch=20, conditions=tuple(range(10)))
    held_out = msfp.record_trajectories(pipe(), calls=sampler.calls(20, seed=9))
    return pipe, sampler.calls(20, seed=1), held_out


def test_layers_that_no_gradient_reaches_are_named_and_have_the_fewest_bits():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {}
            self.inner, self.side, self.out = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, sample):
            with torch.no_grad():
                shift = self.side(sample).mean()
            return self.out(self.inner(sample).relu()) + shift

    noise, network = torch.randn(8, 32), Beside().eval()
    config = QuantizationConfig(end_bits=4, refine=None, budget=5)
    with pytest.warns(UserWarning, match="1 layers get 3 bits.*: side"):
        quantize(network, config, calibration=lambda model: model(noise))
    bits = {name: layer.formats.weight.bits for name, layer in quantized_layers(network).items()}
    assert bits["side"] == 3 < max(bits.values())
