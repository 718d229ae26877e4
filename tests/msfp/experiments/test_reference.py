import dataclasses

import numpy as np
import pytest
import torch

from msfp.errors import InputError
from msfp.evaluation.prediction_errors import noise_errors
from msfp.evaluation.whole_sets import FrechetDistance
from msfp.experiments.reference.digits import digits
from msfp.experiments.reference.features import (
    digit_classifier,
    digit_features,
    photograph_classifier,
)
from msfp.experiments.reference.models import (
    DIGITS,
    DIGITS_DIT,
    digits_transformer,
    digits_unet,
    noise_schedule,
)
from msfp.experiments.reference.photographs import held_out_crops
from msfp.experiments.reference.pipelines import FOLDER, quality, reference_pipeline
from msfp.experiments.reference.training import TrainingState, train_denoiser, training_steps
from msfp.pipelines.class_conditional import PixelDiTPipeline


def test_the_model_is_small_and_of_the_stated_kind(reference):
    size = sum(file.stat().st_size for file in (FOLDER / "digits-ddpm").rglob("*"))
    assert size <= 8_000_000
    assert 1_500_000 <= sum(p.numel() for p in reference.unet.parameters()) <= 2_000_000
    assert {k: v.shape for k, v in digits_unet().state_dict().items()} == {
        k: v.shape for k, v in reference.unet.state_dict().items()
    }


def test_the_model_predicts_the_noise_in_real_digits(reference):
    images, _ = digits()
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(images[:64].shape, generator=draw)
    timestep = torch.full((64,), 300)
    with torch.no_grad():
        noisy = reference.scheduler.add_noise(images[:64], noise, timestep)
        error = (reference.unet(noisy, timestep).sample - noise).square().mean()
    assert error < 0.05


def test_the_model_of_photographs_predicts_velocities_of_crops_that_it_has_not_seen():
    pipe = reference_pipeline("photographs")
    size = sum(file.stat().st_size for file in (FOLDER / "colour-ddpm").rglob("*"))
    assert size <= 20_000_000
    assert 5_000_000 <= sum(p.numel() for p in pipe.unet.parameters()) <= 10_000_000
    images = held_out_crops()[0][:64]
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=draw)
    timestep = torch.full((64,), 500)
    with torch.no_grad():
        noisy = pipe.scheduler.add_noise(images, noise, timestep)
        velocity = pipe.scheduler.get_velocity(images, noise, timestep)
        error = (pipe.unet(noisy, timestep).sample - velocity).square().mean()
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert error < 0.1


def test_the_classifier_reads_digits():
    images, labels = digits()
    with torch.no_grad():
        accuracy = (digit_classifier()(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.98


def test_the_photograph_classifier_knows_crops_of_edges_that_it_has_not_seen():
    images, labels = held_out_crops()
    with torch.no_grad():
        accuracy = (photograph_classifier()(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.8


def test_the_frechet_distance_tells_digits_from_noise_and_halves_from_each_other():
    real = (digits()[0] + 1) / 2
    distance = FrechetDistance(digit_features, real[::2])
    noise = torch.rand(real[1::2].shape, generator=torch.Generator().manual_seed(0))
    assert distance(real[1::2]) < 2 * max(quality()["frechet_real_halves"])
    assert distance(noise) > 10 * distance(real[1::2])
    assert abs(distance(real[::2])) < 1e-3


def test_full_precision_has_no_noise_error_against_itself(reference, trajectories):
    assert max(noise_errors(reference.unet, trajectories=trajectories)) < 1e-10


@pytest.mark.parametrize("kind", [DIGITS, DIGITS_DIT], ids=lambda kind: kind.name)
def test_interrupted_training_continues_to_the_same_weights(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("msfp.experiments.reference.training.SAVE_EVERY", 2)
    short = dataclasses.replace(kind, steps=4, batch=4)

    def train(file, stop):
        state = TrainingState(short, file, seed=0)
        for _loss in training_steps(state, seed=0):
            if state.step == stop:
                break
        return state

    whole = train(tmp_path / "whole", stop=4)
    train(tmp_path / "parts", stop=3)  # its last saved state is that of step 2
    resumed = train(tmp_path / "parts", stop=4)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, average in whole.average.items():
        assert torch.equal(average, resumed.average[name])


def test_seeds_train_different_models(tmp_path):
    states = [TrainingState(DIGITS, tmp_path / "none", seed) for seed in (0, 1)]
    first, second = (next(training_steps(state, seed)) for seed, state in enumerate(states))
    assert first != second


def test_training_writes_a_pipeline_that_samples(tmp_path):
    tiny = dataclasses.replace(DIGITS_DIT, steps=1, batch=2)
    train_denoiser(tiny, tmp_path / "model")
    pipe = reference_pipeline("digits-transformer", folder=tmp_path / "model")
    images = pipe([1, 2, 3], num_inference_steps=2, output_type="np").images
    assert images.shape == (3, 16, 16, 1)
    assert not (tmp_path / "model.state.safetensors").exists()


def test_crops_of_photographs_are_the_same_every_time_and_keep_an_edge_back():
    images, labels = held_out_crops()
    again = held_out_crops.__wrapped__()[0]
    assert torch.equal(images, again)
    assert images.min() >= -1
    assert images.max() <= 1
    assert labels.bincount().min() >= 512 // 6


def test_guidance_of_one_is_the_conditional_model_and_more_moves_away_from_it():
    pipe = PixelDiTPipeline(digits_transformer().eval(), noise_schedule())
    pipe.set_progress_bar_config(disable=True)

    def sample(scale):
        draw = torch.Generator().manual_seed(0)
        return pipe(
            [3, 7], guidance_scale=scale, generator=draw, num_inference_steps=2, output_type="np"
        ).images

    forwards = []
    pipe.transformer.register_forward_hook(
        lambda _module, args, _out: forwards.append(len(args[0]))
    )
    plain, guided = sample(1.0), sample(4.0)
    assert forwards == [2, 2, 4, 4]
    assert not np.array_equal(plain, guided)
    with pytest.raises(InputError, match="class_labels must lie in 0 to 9"):
        pipe([10])


def test_the_transformer_draws_the_digits_of_its_labels():
    labels = list(range(10)) * 2
    images = reference_pipeline("digits-transformer")(
        labels,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=10,
        output_type="np",
    ).images
    with torch.no_grad():
        logits = digit_classifier()(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    assert (logits.argmax(1) == torch.tensor(labels)).float().mean() >= 0.9
