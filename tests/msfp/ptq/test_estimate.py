"""Estimates, against what the same quantization then took."""

import copy
import time

import pytest
import torch
from torch import nn

import msfp
from msfp import InputError, QuantizationConfig, RefinementConfig
from msfp.pipelines.denoiser import denoiser_of
from msfp.ptq import space
from msfp.ptq.estimate import estimate, measured_call
from msfp.reports.estimate import describe

CONFIG = QuantizationConfig(refine=RefinementConfig(samples=16))


@pytest.fixture(scope="module")
def calls():
    return msfp.Sampler(steps=4, batch=4).calls(8, seed=0)


@pytest.fixture(scope="module")
def found(reference, calls):
    """The estimate of the reference model."""
    return estimate(copy.deepcopy(reference), CONFIG, calls=calls)


@pytest.fixture
def pipe(reference):
    return copy.deepcopy(reference)


def test_one_forward_runs_and_is_repeated_by_calibration_and_later_ones_are_counted(pipe, calls):
    ran = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    call = measured_call(pipe, calls[0])
    assert (len(ran), call.forwards, call.rows, call.numbers) == (2, 4, 4, 256)
    assert call.recorded >= 2 * 4 * 4 * 256
    assert call.forward > 0
    assert "forward" not in vars(pipe.unet)
    assert call.calibration.readers == ["conv_in"]


@pytest.mark.slow
def test_the_size_is_that_of_the_file(found, pipe, calls, tmp_path):
    msfp.quantize(pipe, CONFIG, calibration=calls)
    msfp.pack(pipe)
    msfp.save(pipe, tmp_path / "packed")
    file = tmp_path / "packed" / "unet" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size == pytest.approx(found.after, rel=0.05)


def test_layers_are_grouped_by_bits_with_the_formats_that_are_tried(found, pipe):
    narrow, ends = found.groups
    assert (narrow.bits, narrow.layers, ends.bits, ends.layers) == ("W4A4", 63, "W8A8", 2)
    assert narrow.weight_formats == ("E1M2", "E2M1", "E3M0")
    assert narrow.input_formats[3:] == ("E1M3U", "E2M2U", "E3M1U", "E4M0U")
    total = sum(parameter.numel() for parameter in pipe.unet.parameters())
    assert narrow.weights + ends.weights + found.full_precision == total
    assert [stage.name for stage in found.stages] == ["calls", "search", "branches", "refinement"]


def test_a_budget_is_the_size_and_its_measurement_is_a_stage(pipe, calls):
    found = estimate(pipe, QuantizationConfig(budget="1.2MB"), calls=calls)
    assert found.after == pytest.approx(1_200_000, abs=1)
    assert [stage.name for stage in found.stages][:2] == ["calls", "budget"]
    assert found.stages[1].seconds > 0
    plenty = estimate(pipe, QuantizationConfig(budget="1GB"), calls=calls)
    assert found.after < plenty.after < found.before / 2
    bare = estimate(pipe, QuantizationConfig(budget="1.2MB", refine=None), calls=calls)
    assert bare.disk > bare.after  # calls are kept for the measurement
    with pytest.raises(InputError, match=r"budget must be at least .* MB for this denoiser"):
        estimate(pipe, QuantizationConfig(budget="100kB"), calls=calls)


def test_nothing_is_changed_and_the_same_calls_still_run(pipe, calls):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    estimate(pipe, CONFIG, calls=calls)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    msfp.quantize(pipe, QuantizationConfig(refine=None), calibration=calls)


def test_a_forward_of_the_denoiser_itself_stays(pipe, calls):
    own = pipe.unet.forward
    pipe.unet.forward = own  # as Accelerate's hooks do
    measured_call(pipe, calls[0])
    assert vars(pipe.unet)["forward"] is own


@pytest.mark.parametrize("config", [
    QuantizationConfig(refine=None),
    QuantizationConfig(scheme="nvfp4", end_bits=4, refine=None),
    QuantizationConfig(activation_bits=None, refine=None),
], ids=["nearest", "blocks", "weights"])  # fmt: skip
def test_without_refinement_there_are_only_calls_and_a_search(config, pipe, calls):
    found = estimate(pipe, config, calls=calls)
    assert [stage.name for stage in found.stages] == ["calls", "search"]
    assert found.disk == found.after < found.before / 3


def test_offloading_takes_memory_to_the_disk(found, pipe, calls):
    away = estimate(pipe, CONFIG, calls=calls, offload=True)
    assert away.disk - found.disk == pytest.approx(2 * found.before, rel=0.1)


def test_a_config_that_does_not_suit_is_refused_before_anything_runs(pipe):
    def refuse(_pipe):
        raise AssertionError

    with pytest.raises(InputError, match="matches no layer"):
        estimate(pipe, QuantizationConfig(include=["nothing"]), calls=refuse)
    with pytest.raises(InputError, match="did not run"):
        estimate(pipe, CONFIG, calls=lambda _pipe: None)


def test_the_description_fits_80_columns_and_says_what_is_needed(found, tmp_path):
    text = describe(found, "UNet2DModel", tmp_path / "new")
    assert max(map(len, text.splitlines())) <= 80
    for part in ("65 layers", "W4A4", "E2M2U", "search", "refinement", "in all", "are free"):
        assert part in text


def test_too_little_room_is_said(found, tmp_path, monkeypatch):
    monkeypatch.setattr("msfp.reports.estimate.free_disk", lambda _: 1000)
    monkeypatch.setattr("msfp.reports.estimate.available_bytes", lambda: 1000)
    text = describe(found, "UNet2DModel", tmp_path)
    assert "larger disk" in text
    if found.memory is not None:
        assert "--offload" in text


def test_a_full_disk_is_refused_before_the_calls(pipe, tmp_path, monkeypatch):
    def refuse(_pipe):
        raise AssertionError

    monkeypatch.setattr(space, "free_disk", lambda _: 1000)
    with pytest.raises(InputError, match=r"state needs 0\.\d GB on the disk of .* 0\.0 GB are"):
        msfp.quantize(pipe, CONFIG, calibration=refuse, state=tmp_path / "state")
    with pytest.raises(InputError, match=r"offload needs 0\.\d GB"):
        msfp.quantize(pipe, CONFIG, calibration=refuse, offload=True)


@pytest.mark.slow
def test_the_time_is_about_right(pipe, calls):
    found = estimate(pipe, CONFIG, calls=calls)
    start = time.perf_counter()
    msfp.quantize(pipe, CONFIG, calibration=calls)
    assert 0.2 < found.seconds / (time.perf_counter() - start) < 5


def test_networks_of_all_kinds_are_estimated():
    network = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    found = estimate(network, calls=lambda each: each(torch.ones(4, 8)))
    assert sum(group.layers for group in found.groups) == 2
    assert denoiser_of(network) is network


def test_blocks_that_are_refined_have_a_search_and_branches(pipe, calls):
    config = QuantizationConfig(scheme="nvfp4", refine=RefinementConfig(branch_rank=2))
    found = {stage.name: stage for stage in estimate(pipe, config, calls=calls).stages}
    assert list(found) == ["calls", "search", "branches", "refinement"]
    assert found["search"].seconds > 0
