import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import make, pipeline

import msfp
from msfp import FinetuneConfig, InputError, QuantizationConfig, Sampler
from msfp.evaluation.comparison import compare
from msfp.evaluation.features import pixels
from msfp.evaluation.fingerprint import KIND, pipeline_digest
from msfp.evaluation.image_metrics import KEPT_IMAGES, ImageMeasures
from msfp.evaluation.metrics import (
    PairedMeasures,
    noise_errors,
    paired_psnr,
    paired_sqnr,
    paired_ssim,
)
from msfp.layers.base import quantized_layers
from msfp.schedulers.samplers import use_sampler
from msfp.support.run_files import save_run, saved_tensors

COUNT, SEED = 8, 3


@pytest.fixture(scope="module")
def sealed(reference, calibration):
    pipe = copy.deepcopy(reference)
    msfp.quantize(pipe, QuantizationConfig(), calibration=calibration)
    msfp.seal(pipe.unet)
    return pipe


@pytest.fixture(scope="module")
def found(reference, sealed, sampler):
    return compare(reference, sealed, sampler, count=COUNT, seed=SEED, features=pixels)


def test_images_are_paired_by_their_noise(found, reference, sealed, sampler):
    full, images = (sampler(pipe, COUNT, SEED) for pipe in (reference, sealed))
    assert torch.equal(found.images[0], full)
    assert torch.equal(found.images[1], images)
    assert found.psnr == paired_psnr(images, full)
    assert found.sqnr == pytest.approx(
        10 * math.log10((full**2).sum() / ((images - full) ** 2).sum()), rel=1e-5
    )
    assert 0 < found.ssim < 1


def test_measures_of_batches_are_those_of_all_images_together():
    images, pairs = torch.rand(7, 3, 12, 14), torch.rand(7, 3, 12, 14)
    measures = PairedMeasures()
    for some in (slice(0, 3), slice(3, 7)):
        measures.update(images[some], pairs[some])
    assert measures.psnr == pytest.approx(paired_psnr(images, pairs), rel=1e-9)
    assert measures.sqnr == pytest.approx(paired_sqnr(images, pairs), rel=1e-9)
    assert measures.ssim == pytest.approx(paired_ssim(images, pairs), rel=1e-9)
    small = PairedMeasures()
    small.update(images[..., :8], pairs[..., :8])
    assert math.isnan(small.ssim)


def test_errors_by_timestep_are_those_of_predictions(found, reference, sealed, sampler):
    paths = msfp.record_trajectories(reference, sampler.calls(1, SEED + 2))
    assert found.timesteps == paths.timesteps.tolist()
    assert found.noise_errors == pytest.approx(noise_errors(sealed.unet, paths), rel=1e-5)
    energy = paths.predictions[0].double().square().mean().item()
    assert found.noise_sqnr[0] == pytest.approx(10 * math.log10(energy / found.noise_errors[0]))


def test_the_error_of_a_layer_is_that_of_its_output_for_full_precision_inputs(
    found, reference, sealed, sampler
):
    name = "mid_block.attentions.0.to_q"
    plain, layer = (pipe.unet.get_submodule(name) for pipe in (reference, sealed))
    inputs = []
    handle = plain.register_forward_hook(lambda _module, args, _output: inputs.append(args[0]))
    paths = msfp.record_trajectories(reference, sampler.calls(1, SEED + 2))
    inputs.clear()
    rows = torch.arange(sampler.batch)
    with torch.no_grad():
        for step in range(sampler.steps):
            paths.predict(reference.unet, torch.full_like(rows, step), rows)
        handle.remove()
        x = torch.cat(inputs)
        expected = plain(x)
        noise = layer(x) - expected
    ratio = 10 * math.log10(expected.double().square().sum() / noise.double().square().sum())
    assert found.layers[name] == pytest.approx(ratio, abs=1e-4)
    assert found.layers.keys() == quantized_layers(sealed.unet).keys()


def test_more_bits_are_closer_by_every_measure(reference, calibration, sampler, found):
    fine = copy.deepcopy(reference)
    msfp.quantize(fine, QuantizationConfig(6, 6), calibration=calibration)
    msfp.seal(fine.unet)
    better = compare(reference, fine, sampler, count=COUNT, seed=SEED, features=pixels)
    assert better.psnr > found.psnr + 6
    assert better.sqnr > found.sqnr + 6
    assert better.ssim > found.ssim
    assert better.noise_error < found.noise_error / 8
    assert abs(better.frechet - better.frechet_floor) < abs(found.frechet - found.frechet_floor)
    inner = found.layers.keys() - {"conv_in", "conv_out"}
    assert all(better.layers[name] > found.layers[name] + 3 for name in inner)
    assert found.bytes[0] == better.bytes[0] > better.bytes[1] > found.bytes[1]


def test_a_model_with_a_router_can_be_compared(quantized, reference, trajectories, sampler):
    pipe, _ = quantized()
    msfp.finetune(pipe.unet, trajectories, FinetuneConfig(hub=2, rank=2, steps=2, batch=4))
    found = compare(reference, pipe, sampler, count=2, seed=SEED, features=pixels)
    assert min(found.layers.values()) > 10


def test_both_branches_of_guidance_count(tmp_path):
    full = pipeline("conditional_unet", tmp_path)
    sampler = Sampler(2, 2, ("a", "a a"), guidance_scale=3.0)
    quantized = copy.deepcopy(full)
    msfp.quantize(quantized, QuantizationConfig(), calibration=sampler.calls(2, 0))
    msfp.seal(quantized.unet)
    found = compare(full, quantized, sampler, count=4, seed=0, features=pixels)
    assert found.noise_error > 0
    assert found.images[1].shape == (4, 3, 16, 16)
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_numbers_that_json_does_not_have_are_null(found):
    values = found.to_dict() | {"images": None}
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["conditions"] == []
    assert values["steps"] == 4


def test_what_cannot_be_compared_is_refused(reference, sealed, sampler):
    def refused(full, quantized, message, count=4):
        with pytest.raises(InputError, match=message):
            compare(full, quantized, sampler, count=count, seed=0, features=pixels)

    refused(reference, reference, "must be compared with one in full precision")
    refused(sealed, sealed, "must be compared with one in full precision")
    refused(reference, sealed, "count must be at least 2", count=1)
    other = copy.deepcopy(reference)
    other.unet = make("unet")
    refused(other, sealed, "different models: layer")


def compared(full, quantized, sampler, file, monkeypatch, **options):
    """What a comparison of four batches found, with a state after each, and the rows it asked."""
    monkeypatch.setattr("msfp.support.autosave.SAVE_SECONDS", 0)
    monkeypatch.setattr("msfp.support.autosave.SAVE_SHARE", math.inf)
    starts = []
    one_batch = Sampler.one_batch

    def noted(self, pipe, seed, start):
        starts.append((seed, start))
        return one_batch(self, pipe, seed, start)

    monkeypatch.setattr(Sampler, "one_batch", noted)
    settings = {"count": 14, "seed": SEED, "features": pixels} | options
    try:
        return compare(full, quantized, sampler, state=file, **settings), starts
    finally:
        monkeypatch.undo()


def stopped_after(images):
    def advance(stage, done, _total):
        if stage.startswith("images") and done >= images:
            raise KeyboardInterrupt

    return advance


@pytest.fixture(scope="module")
def short(sampler):
    return replace(sampler, steps=2, batch=4)


def test_a_comparison_that_was_stopped_goes_on_to_the_same_bits(
    reference, sealed, short, tmp_path, monkeypatch
):
    file = tmp_path / "e.safetensors"
    whole, _ = compared(reference, sealed, short, None, monkeypatch)
    for images in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            compared(reference, sealed, short, file, monkeypatch, advance=stopped_after(images))
    assert sorted(each.name for each in tmp_path.iterdir()) == [file.name]
    found, starts = compared(reference, sealed, short, file, monkeypatch)
    assert {start for seed, start in starts if seed == SEED} == {8, 12}
    assert found.to_dict() == whole.to_dict()
    assert all(torch.equal(*each) for each in zip(found.images, whole.images, strict=True))


def test_a_comparison_stopped_after_its_images_is_not_begun_anew(
    reference, sealed, short, tmp_path, monkeypatch, recwarn
):
    file = tmp_path / "e.safetensors"
    with pytest.raises(KeyboardInterrupt):
        compared(reference, sealed, short, file, monkeypatch, advance=stopped_after(14))
    found, starts = compared(reference, sealed, short, file, monkeypatch)
    assert {start for seed, start in starts if seed == SEED} == {12}
    assert found.psnr > 0
    assert not [each for each in recwarn if "update" in str(each.message)]


def other_features(images):
    return pixels(images) + 1


OTHER_COMPARISONS = {
    "seed": ({"seed": 4}, {}, 0, "its seed is 3, not 4"),
    "count": ({"count": 13}, {}, 0, "its count is 14, not 13"),
    "features": ({"features": other_features}, {}, 0, "features must be those of the state"),
    "sampler": ({}, {"steps": 3}, 0, "its steps is 2, not 3"),
    "pipeline": ({}, {}, 1, "its quantized pipeline is "),
}


@pytest.mark.parametrize("case", OTHER_COMPARISONS)
def test_the_state_of_another_comparison_is_refused(
    case, reference, sealed, short, tmp_path, monkeypatch
):
    options, call, bias, message = OTHER_COMPARISONS[case]
    file = tmp_path / "e.safetensors"
    with pytest.raises(KeyboardInterrupt):
        compared(reference, sealed, short, file, monkeypatch, advance=stopped_after(4))
    before = file.read_bytes()
    other = copy.deepcopy(sealed)
    other.unet.conv_out.bias.data += bias
    with pytest.raises(InputError, match=message):
        compared(reference, other, replace(short, **call), file, monkeypatch, **options)
    assert file.read_bytes() == before


def test_features_that_are_not_numbers_can_be_gone_on_with(tmp_path):
    file = tmp_path / "e.safetensors"
    one, other = (
        ImageMeasures(lambda images: pixels(images) + float("nan"), None) for _ in range(2)
    )
    images = torch.rand(4, 1, 16, 16)
    one.update(images, images, images)
    save_run(file, KIND, one.tensors(), {"run": {}})
    other.restore(saved_tensors(file))
    assert other.count == 4


def test_what_tells_pipelines_apart_is_equal_in_every_process():
    code = (
        "from msfp.evaluation.fingerprint import pipeline_digest; "
        "from msfp.experiments.reference import ddim_pipeline; "
        "from msfp.schedulers.samplers import use_sampler; pipe = ddim_pipeline(); "
        "use_sampler(pipe, 'dpm++'); print(pipeline_digest(pipe))"
    )
    told = {
        subprocess.run(  # noqa: S603
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "01"
    }
    assert len(told) == 1
    assert told != {""}


def test_samplers_and_weights_of_other_settings_are_told_apart(reference):
    told = set()
    for change in (
        lambda _: None,
        lambda pipe: pipe.scheduler.register_to_config(clip_sample_range=2.0),
        lambda pipe: use_sampler(pipe, "plms"),
        lambda pipe: pipe.unet.conv_out.bias.data.add_(1),
    ):
        pipe = copy.deepcopy(reference)
        change(pipe)
        told.add(pipeline_digest(pipe))
    assert len(told) == 4
    with pytest.raises(InputError, match="state must be of pipelines in memory"):
        pipeline_digest(SimpleNamespace(components={"unet": make("unet").to("meta")}))


def test_where_no_state_can_be_written_is_refused_before_anything_is_sampled(
    reference, sealed, short, tmp_path
):
    for name in ("missing/e.safetensors", "e.bin"):
        with pytest.raises(InputError, match=r"state .* must be a new .safetensors file"):
            compare(
                reference, sealed, short, count=4, seed=0, features=pixels, state=tmp_path / name
            )


def test_a_file_that_is_no_state_is_refused(reference, sealed, short, tmp_path):
    file = tmp_path / "e.safetensors"
    file.write_bytes(b"something else")
    with pytest.raises(InputError, match="is not a state of msfp evaluate"):
        compare(reference, sealed, short, count=4, seed=0, features=pixels, state=file)
    assert file.read_bytes() == b"something else"


def test_no_more_images_are_kept_than_are_shown():
    measures = ImageMeasures(pixels, None)
    for _ in range(2):
        images = torch.rand(50, 1, 16, 16)
        measures.update(images, images, images)
    kept = measures.tensors()
    assert len(kept["full"]) == len(kept["quantized"]) == KEPT_IMAGES
    assert measures.count == 100
