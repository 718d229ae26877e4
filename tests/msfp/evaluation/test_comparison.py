import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from families import make, pipeline

import msfp
from msfp import FinetuneConfig, InputError, QuantizationConfig, Sampler
from msfp.evaluation.comparison import compare
from msfp.evaluation.features import pixels
from msfp.evaluation.prediction_errors import noise_errors
from msfp.evaluation.whole_sets import paired_psnr
from msfp.layers.base import quantized_layers

COUNT, SEED = 8, 3


@pytest.fixture(scope="module")
def packed(packed):
    return packed[0]


@pytest.fixture(scope="module")
def found(reference, packed, sampler):
    return compare(
        packed, original=reference, sampler=sampler, count=COUNT, seed=SEED, features=pixels
    )


def test_images_are_paired_by_their_noise(found, reference, packed, sampler):
    full, images = (sampler(pipe, COUNT, SEED) for pipe in (reference, packed))
    assert torch.equal(found.images[0], full)
    assert torch.equal(found.images[1], images)
    assert found.values["psnr"] == paired_psnr(images, full)
    assert found.values["sqnr"] == pytest.approx(
        10 * math.log10((full**2).sum() / ((images - full) ** 2).sum()), rel=1e-5
    )
    assert 0 < found.values["ssim"] < 1


def test_errors_by_timestep_are_those_of_predictions(found, reference, packed, sampler):
    paths = msfp.record_trajectories(reference, calls=sampler.calls(1, SEED + 2))
    assert found.timesteps == paths.timesteps.tolist()
    assert found.noise_errors == pytest.approx(
        noise_errors(packed.unet, trajectories=paths), rel=1e-5
    )
    energy = paths.predictions[0].double().square().mean().item()
    assert found.noise_sqnr[0] == pytest.approx(10 * math.log10(energy / found.noise_errors[0]))


def test_the_error_of_a_layer_is_that_of_its_output_for_full_precision_inputs(
    found, reference, packed, sampler
):
    name = "mid_block.attentions.0.to_q"
    plain, layer = (pipe.unet.get_submodule(name) for pipe in (reference, packed))
    inputs = []
    handle = plain.register_forward_hook(lambda _module, args, _output: inputs.append(args[0]))
    paths = msfp.record_trajectories(reference, calls=sampler.calls(1, SEED + 2))
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
    assert found.layers.keys() == quantized_layers(packed.unet).keys()


@pytest.mark.slow
def test_more_bits_are_closer_by_every_measure(reference, calibration, sampler, found):
    pipe = copy.deepcopy(reference)
    msfp.quantize(pipe, QuantizationConfig(6, activation_bits=6), calibration=calibration)
    msfp.pack(pipe)
    better = compare(
        pipe, original=reference, sampler=sampler, count=COUNT, seed=SEED, features=pixels
    )
    fine, coarse = better.values, found.values
    assert fine["psnr"] > coarse["psnr"] + 6
    assert fine["sqnr"] > coarse["sqnr"] + 6
    assert fine["ssim"] > coarse["ssim"]
    assert better.noise_error < found.noise_error / 8
    floors = (abs(each["frechet"] - each["frechet_floor"]) for each in (fine, coarse))
    assert next(floors) < next(floors)
    inner = found.layers.keys() - {"conv_in", "conv_out"}
    assert all(better.layers[name] > found.layers[name] + 3 for name in inner)
    assert found.bytes[0] == better.bytes[0] > better.bytes[1] > found.bytes[1]


def test_a_model_with_a_router_can_be_compared(quantized, reference, trajectories, sampler):
    pipe, _ = quantized()
    msfp.finetune(
        pipe.unet, FinetuneConfig(hub=2, rank=2, steps=2, batch=4), trajectories=trajectories
    )
    found = compare(pipe, original=reference, sampler=sampler, count=2, seed=SEED, features=pixels)
    assert min(found.layers.values()) > 10


@pytest.mark.slow
def test_both_branches_of_guidance_count(tmp_path):
    full = pipeline("conditional_unet", tmp_path)
    sampler = Sampler(2, 2, ("a", "a a"), guidance_scale=3.0)
    quantized = copy.deepcopy(full)
    msfp.quantize(quantized, QuantizationConfig(), calibration=sampler.calls(2, 0))
    msfp.pack(quantized.unet)
    found = compare(quantized, original=full, sampler=sampler, count=4, seed=0, features=pixels)
    assert found.noise_error > 0
    assert found.images[1].shape == (4, 3, 16, 16)
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_numbers_that_json_does_not_have_are_null(found):
    values = found.to_dict()
    assert not values.keys() & {"images", "inputs", "measures", "sampler"}
    assert values.keys() >= {"psnr", "ssim", "sqnr", "frechet", "frechet_floor", "noise_error"}
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["conditions"] == []
    assert values["steps"] == 4


def test_what_cannot_be_compared_is_refused(reference, packed, sampler):
    def refused(full, quantized, message, count=4):
        with pytest.raises(InputError, match=message):
            compare(quantized, original=full, sampler=sampler, count=count, seed=0, features=pixels)

    refused(reference, reference, "must be compared with one in full precision")
    refused(packed, packed, "must be compared with one in full precision")
    refused(reference, packed, "count must be at least 2", count=1)
    refused(reference, packed.unet, "model must be of the type DiffusionPipeline, not UNet2DModel")
    refused(reference.unet, packed, "original must be of the type DiffusionPipeline, not UNet2DMo")
    other = copy.deepcopy(reference)
    other.unet = make("unet")
    refused(other, packed, "different models: layer")


def compared(full, quantized, sampler, file, monkeypatch, **options):
    """What a comparison of four batches found, with a state after each, and the rows it sampled."""
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
        return compare(quantized, original=full, sampler=sampler, state=file, **settings), starts
    finally:
        monkeypatch.undo()


def stopped_after(images):
    def progress(stage, done, _total):
        if stage.startswith("images") and done >= images:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def short(sampler):
    return replace(sampler, steps=2, batch=4)


def test_a_comparison_that_was_stopped_resumes_to_the_same_bits(
    reference, packed, short, tmp_path, monkeypatch
):
    file = tmp_path / "e.safetensors"
    whole, _ = compared(reference, packed, short, None, monkeypatch)
    for images in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            compared(reference, packed, short, file, monkeypatch, progress=stopped_after(images))
    assert sorted(each.name for each in tmp_path.iterdir()) == [file.name]
    found, starts = compared(reference, packed, short, file, monkeypatch)
    assert {start for seed, start in starts if seed == SEED} == {8, 12}
    assert found.to_dict() == whole.to_dict()
    assert all(torch.equal(*each) for each in zip(found.images, whole.images, strict=True))


def test_a_comparison_stopped_after_its_images_is_not_begun_again(
    reference, packed, short, tmp_path, monkeypatch, recwarn
):
    file = tmp_path / "e.safetensors"
    with pytest.raises(KeyboardInterrupt):
        compared(reference, packed, short, file, monkeypatch, progress=stopped_after(14))
    found, starts = compared(reference, packed, short, file, monkeypatch)
    assert {start for seed, start in starts if seed == SEED} == {12}
    assert found.values["psnr"] > 0
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
    case, reference, packed, short, tmp_path, monkeypatch
):
    options, call, bias, message = OTHER_COMPARISONS[case]
    file = tmp_path / "e.safetensors"
    with pytest.raises(KeyboardInterrupt):
        compared(reference, packed, short, file, monkeypatch, progress=stopped_after(4))
    before = file.read_bytes()
    other = copy.deepcopy(packed)
    other.unet.conv_out.bias.data += bias
    with pytest.raises(InputError, match=message):
        compared(reference, other, replace(short, **call), file, monkeypatch, **options)
    assert file.read_bytes() == before


def test_where_no_state_can_be_written_is_refused_before_anything_is_sampled(
    reference, packed, short, tmp_path
):
    for name in ("missing/e.safetensors", "e.bin"):
        with pytest.raises(InputError, match=r"state .* must be a new .safetensors file"):
            compare(
                packed,
                original=reference,
                sampler=short,
                count=4,
                seed=0,
                features=pixels,
                state=tmp_path / name,
            )


def test_a_file_that_is_no_state_is_refused(reference, packed, short, tmp_path):
    file = tmp_path / "e.safetensors"
    file.write_bytes(b"something else")
    with pytest.raises(InputError, match="cannot be read as a state of msfp evaluate"):
        compare(
            packed, original=reference, sampler=short, count=4, seed=0, features=pixels, state=file
        )
    assert file.read_bytes() == b"something else"
