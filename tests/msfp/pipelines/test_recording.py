import copy

import pytest
import torch
from calibrations import same
from diffusers import PNDMPipeline, PNDMScheduler
from torch import nn

from msfp import InputError, Sampler, calibrate, record_trajectories
from msfp.pipelines.recording import Recording, recorded
from msfp.pipelines.trajectories import WholeForwards


def test_a_recording_holds_the_inputs_and_outputs_of_the_denoiser(reference, trajectories):
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
    rounds = record_trajectories(reference, calls=Sampler(2, 4).calls(8, seed=1))
    first = record_trajectories(reference, calls=Sampler(2, 4).calls(4, seed=1))
    assert torch.equal(rounds.samples[:, :4], first.samples)


def noted(call, made):
    """A call that adds itself to a list when it is made."""
    return lambda pipe: (made.append(call), call(pipe))


def test_calls_that_are_observed_as_they_are_recorded_give_what_two_passes_give(reference):
    calls, made = Sampler(2, 4).calls(12, seed=1), []
    recording = Recording([noted(call, made) for call in calls])
    calibration = calibrate(reference, calls=recording.calls)
    paths = recording.trajectories(reference)
    assert made == calls
    assert same(calibration, calibrate(reference, calls=calls))
    assert_equal(paths, record_trajectories(reference, calls=calls))
    assert not any(module._forward_hooks for module in reference.unet.modules())


def test_calls_that_were_not_made_while_recording_are_made_for_the_path(reference):
    calls, made = Sampler(2, 4).calls(12, seed=1), []
    recording = Recording([noted(call, made) for call in calls])
    recording.calls[1](reference)
    told = []
    paths = recording.trajectories(reference, lambda *stage: told.append(stage))
    assert made == [calls[1], calls[0], calls[2]]
    assert told == [("recording", 1, 2), ("recording", 2, 2)]
    assert_equal(paths, record_trajectories(reference, calls=calls))


def assert_equal(one, other):
    for name in ("timesteps", "samples", "predictions"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.conditions == other.conditions


def test_samplers_that_call_the_denoiser_more_than_once_a_step_are_recorded_whole(reference):
    pipe = copy.deepcopy(reference)
    config = pipe.scheduler.config
    pipe.scheduler = PNDMScheduler.from_config(config, skip_prk_steps=True)
    pipe = PNDMPipeline(pipe.unet, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    recording = record_trajectories(pipe, calls=Sampler(5, 4).calls(8, seed=0))
    assert len(recording.timesteps) == len(pipe.scheduler.timesteps)
    assert recording.samples.shape[:2] == (len(pipe.scheduler.timesteps), 8)


class Conditioned(nn.Module):
    """A denoiser whose prediction shows every condition that it was given."""

    def forward(self, x, timestep, label=None, more=None, factor=1.0):  # noqa: ARG002
        y = factor * x + label[:, None]
        return y if more is None else y + more["parts"][0][:, None]


def test_conditions_may_differ_by_row_and_by_step():
    network, x = Conditioned(), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    def sample(network):
        for step, timestep in enumerate([5, 3]):
            parts = {"parts": [torch.tensor([10.0, 20.0]) * step]}
            network(x, timestep, label=torch.tensor([1.0, 2.0]), more=parts, factor=2.0)

    paths = record_trajectories(network, calls=[sample, sample])
    assert paths.timesteps.tolist() == [5, 3]
    step, row = torch.tensor([1, 0, 1, 1]), torch.tensor([3, 2, 0, 0])
    expected = torch.stack([2 * x[1] + 22, 2 * x[0] + 1, 2 * x[0] + 11, 2 * x[0] + 11])
    assert torch.equal(paths.predict(network, step, row), expected)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "calls must be one or more functions of the pipeline"),
        ([lambda _: None], "calls must run the denoiser at least once"),
        ([(2, 1), (2, 2)], "all calls must take the sampler through the same timesteps"),
    ],
)
def test_calls_that_do_not_go_together_are_refused(calls, message):
    def call(each):
        if callable(each):
            return each
        rows, timestep = each
        return lambda network: network(torch.ones(rows, 3), timestep, torch.ones(rows))

    with pytest.raises(InputError, match=message):
        record_trajectories(Conditioned(), calls=[call(each) for each in calls])


def test_timesteps_may_differ_by_row():
    network, x = Conditioned(), torch.ones(2, 3)
    paths = record_trajectories(
        network, calls=lambda network: network(x, torch.tensor([1, 2]), torch.tensor([0.0, 4.0]))
    )
    assert paths.timesteps.tolist() == [1]
    assert paths.predict(network, torch.tensor([0]), torch.tensor([1])).tolist() == [[5.0] * 3]


class Mean(nn.Module):
    """A network whose rows depend on each other."""

    def forward(self, x):
        return x - x.mean(dim=0)


class Lists(nn.Module):
    """A network that takes and returns a tensor for each row, of any size, and another output."""

    def forward(self, x, t):
        return [each * t for each in x], {"sum": sum(each.sum() for each in x)}


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(
    ("network", "calls"),
    [
        (Conditioned(), [lambda n, k=k: n(noise(2, k), 1, noise(2)) for k in (3, 4)]),
        (Conditioned(), [lambda n, f=f: n(noise(2, 3), 1, noise(2), factor=f) for f in (1.0, 2.0)]),
        (Mean(), [lambda n: n(noise(5, 3)), lambda n: n(2 * noise(5, 3))]),
        (Lists(), [lambda n: n([noise(3), noise(2, 2)], t=2), lambda n: n([noise(1)], t=2)]),
    ],
    ids=["two sizes", "other conditions", "rows that mix", "lists"],
)  # fmt: skip
def test_forwards_whose_rows_cannot_be_joined_are_recorded_whole(network, calls):
    paths = record_trajectories(network, calls=calls)
    assert isinstance(paths, WholeForwards)
    assert paths.samples.shape[:2] == paths.predictions.shape[:2] == (1, 2)
    row = torch.tensor([1, 0, 1])
    step = torch.zeros_like(row)
    assert torch.equal(paths.predict(network, step, row), paths.predictions[step, row])
    assert paths.predictions.square().sum() > 0


def test_rows_of_a_network_without_a_timestep_are_joined():
    network = nn.Linear(3, 3)
    paths = record_trajectories(
        network, calls=[lambda n: n(noise(2, 3)), lambda n: n(-noise(2, 3))]
    )
    assert paths.samples.shape == (1, 4, 3)
    assert not paths.timed
