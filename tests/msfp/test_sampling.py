import copy

import pytest
import torch
from diffusers import PNDMPipeline, PNDMScheduler

from msfp import InputError, Sampler, record_trajectories
from msfp.sampling import recorded


def test_an_image_depends_on_the_seed_and_not_on_how_many_are_sampled(reference):
    sampler = Sampler(steps=2, batch=4)
    many = sampler(reference, 6, seed=3)
    assert many.shape == (6, 1, 16, 16)
    assert 0 <= many.min() <= many.max() <= 1
    assert torch.equal(sampler(reference, 3, seed=3), many[:3])
    assert not torch.equal(sampler(reference, 3, seed=4), many[:3])


def test_a_recorded_trajectory_is_what_the_denoiser_was_asked_and_said(reference, trajectories):
    assert trajectories.timesteps.tolist() == [999, 749, 499, 249]
    assert trajectories.samples.shape == trajectories.predictions.shape == (4, 16, 1, 16, 16)
    with torch.no_grad():
        again = reference.unet(trajectories.samples[2, :8], 499).sample
    torch.testing.assert_close(again, trajectories.predictions[2, :8])


def test_a_trajectory_ends_in_the_image(reference, sampler, trajectories):
    last, prediction = trajectories.samples[-1], trajectories.predictions[-1]
    reference.scheduler.set_timesteps(sampler.steps)
    final = reference.scheduler.step(prediction, trajectories.timesteps[-1], last).prev_sample
    images = sampler(reference, 16, seed=5)
    torch.testing.assert_close((final / 2 + 0.5).clamp(0, 1), images, atol=1e-6, rtol=0)


def test_recording_stops_with_its_block(reference, sampler):
    with recorded(reference.unet) as calls:
        sampler(reference, 8, seed=0)
    sampler(reference, 8, seed=0)
    assert len(calls) == sampler.steps


def test_recording_in_rounds_equals_recording_at_once(reference):
    rounds = record_trajectories(reference, Sampler(2, 4), count=8, seed=1)
    first = record_trajectories(reference, Sampler(2, 4), count=4, seed=1)
    assert torch.equal(rounds.samples[:, :4], first.samples)


def test_samplers_that_call_the_denoiser_more_than_once_a_step_are_recorded_whole(reference):
    pipe = copy.deepcopy(reference)
    config = pipe.scheduler.config
    pipe.scheduler = PNDMScheduler.from_config(config, skip_prk_steps=True)
    pipe = PNDMPipeline(pipe.unet, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    recording = record_trajectories(pipe, Sampler(5, 4), count=8, seed=0)
    assert len(recording.timesteps) == len(pipe.scheduler.timesteps)
    assert recording.samples.shape[:2] == (len(pipe.scheduler.timesteps), 8)


def test_a_conditional_pipeline_is_refused():
    class Conditional:
        def __call__(self, prompt):
            return prompt

    with pytest.raises(InputError, match="Conditional is not an unconditional pipeline"):
        Sampler(2, 4)(Conditional(), 4, seed=0)
