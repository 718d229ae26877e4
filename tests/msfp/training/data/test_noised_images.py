import copy

import families
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from msfp import InputError, Sampler, data_trajectories, record_trajectories
from msfp.experiments.reference.digits import digits
from msfp.pipelines.denoiser import denoiser_of
from msfp.training.data.noised_images import noised

CALLS = Sampler(steps=3, batch=4).calls(8, seed=0)


@pytest.fixture(scope="module")
def images():
    return digits()[0][:8]


@pytest.fixture(scope="module")
def paths(reference, images):
    return data_trajectories(reference, calls=CALLS, images=images)


def test_what_the_denoiser_read_is_each_image_and_noise_at_the_levels_of_the_grid(
    reference, paths, images
):
    assert paths.timesteps.tolist() == [999, 666, 332]
    assert paths.samples.shape == (3, 8, 1, 16, 16)
    bars = reference.scheduler.alphas_cumprod[paths.timesteps].view(3, 1, 1, 1, 1)
    noise = (paths.samples - bars.sqrt() * images) / (1 - bars).sqrt()
    assert noise.std((2, 3, 4)).sub(1).abs().max() < 0.2
    flat = noise.flatten(0, 1).flatten(1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.3  # all are drawn by themselves


def test_predictions_are_those_of_the_denoiser(reference, paths):
    step, row = torch.tensor([2, 0, 1, 1]), torch.tensor([7, 3, 0, 4])
    with torch.no_grad():
        again = paths.predict(reference.unet, step, row)
    torch.testing.assert_close(again, paths.predictions[step, row])


def test_noise_depends_on_the_seed_and_the_place_of_an_image_alone(reference, paths, images):
    at_once = Sampler(steps=3, batch=8).calls(8, seed=5)
    assert torch.equal(
        data_trajectories(reference, calls=at_once, images=images).samples, paths.samples
    )
    other = data_trajectories(reference, calls=CALLS, images=images, seed=1)
    assert not torch.equal(other.samples, paths.samples)


def test_after_the_last_image_the_first_is_next_with_other_noise(reference, paths, images):
    few = data_trajectories(reference, calls=CALLS, images=images[:3])
    assert torch.equal(few.samples[:, :3], paths.samples[:, :3])
    weight = reference.scheduler.alphas_cumprod[paths.timesteps].sqrt().view(3, 1, 1, 1, 1)
    moved = weight * (images[0] - images[3])
    torch.testing.assert_close(few.samples[:, 3], paths.samples[:, 3] + moved[:, 0])


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers and NumPy 2
@pytest.mark.parametrize(
    "kind", [EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_samplers_of_other_units_give_the_denoiser_the_same(kind, images):
    ddim = DDIMScheduler()
    other = kind(timestep_spacing="leading", beta_start=0.0001, beta_end=0.02)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for scheduler in (ddim, other):
        scheduler.set_timesteps(4)
    for timestep in other.timesteps:
        read = noised(other, images, noise, timestep)
        torch.testing.assert_close(read, noised(ddim, images, noise, timestep.long()))


def test_a_timestep_that_is_visited_twice_has_one_noise(reference, images):
    pipe = copy.copy(reference)
    pipe.scheduler = PNDMScheduler.from_config(reference.scheduler.config, skip_prk_steps=True)
    pipe.scheduler.step = lambda output, _timestep, sample, **_: PNDMScheduler.step(
        pipe.scheduler, output, _timestep, sample
    )
    found = data_trajectories(pipe, calls=CALLS, images=images)
    times = found.timesteps.tolist()
    assert times[1] == times[2]
    assert torch.equal(found.samples[1], found.samples[2])
    assert not torch.equal(found.samples[0], found.samples[1])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_timesteps_and_conditions_of_any_family_are_those_of_its_calls(family, tmp_path):
    pipe = families.pipeline(family, tmp_path)
    recorded = record_trajectories(pipe, calls=families.images)
    rows, shape = recorded.samples.shape[1], recorded.samples.shape[2:]
    clean = torch.zeros(rows, *shape)
    found = data_trajectories(pipe, calls=families.images, images=clean)
    assert torch.equal(found.timesteps, recorded.timesteps)
    assert found.samples.shape == recorded.samples.shape
    assert found.conditions.keys() == recorded.conditions.keys()
    with torch.no_grad():
        step, row = torch.tensor([1]), torch.tensor([rows - 1])
        again = found.predict(denoiser_of(pipe), step, row)
    torch.testing.assert_close(again, found.predictions[step, row], rtol=1e-3, atol=1e-4)
    scheduler = pipe.scheduler
    level = scheduler.sigmas[1] if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else (
        1 - scheduler.alphas_cumprod[scheduler.timesteps[1]]
    ).sqrt()  # fmt: skip
    assert found.samples[1].std() == pytest.approx(level.item(), rel=0.1)


@pytest.mark.parametrize("family", ["conditional_unet", "dit", "sd3"])
def test_branches_of_guidance_have_the_same_images_and_noise(family, tmp_path):
    pipe = families.pipeline(family, tmp_path)
    recorded = record_trajectories(pipe, calls=families.images)
    rows, shape = recorded.samples.shape[1], recorded.samples.shape[2:]
    found = data_trajectories(pipe, calls=families.images, images=torch.zeros(rows, *shape))
    one, other = found.samples.chunk(2, dim=1)
    assert torch.equal(one, other)
    assert one.flatten(0, 1).unique(dim=0).shape[0] == len(one.flatten(0, 1))


def test_neither_the_pipeline_nor_its_sampler_keeps_anything_of_it(reference, images):
    before = Sampler(2, 4)(reference, 4, seed=0)
    with pytest.raises(InputError, match="must have the shape"):
        data_trajectories(reference, calls=CALLS, images=images[:, :, :8])
    data_trajectories(reference, calls=CALLS, images=images)
    assert torch.equal(Sampler(2, 4)(reference, 4, seed=0), before)
    assert not reference.unet._forward_pre_hooks
    assert not reference.unet._forward_hooks


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torch.zeros(4, 1, 8, 8),
            r"must have the shape \(1, 16, 16\) each, not \(1, 8, 8\)",
        ),
        (torch.zeros(0, 1, 16, 16), "with a count of 1 or more, not"),
        (torch.tensor(1.0), "with a count of 1 or more, not"),
        (torch.zeros(4, 1, 16, 16, dtype=torch.uint8), "images must be a floating-point tensor"),
        ([[0.5]], "images must be a floating-point tensor"),
        (torch.full((4, 1, 16, 16), torch.nan), "images must be finite"),
    ],
)
def test_images_that_the_denoiser_cannot_read_are_refused(reference, given, message):
    with pytest.raises(InputError, match=message):
        data_trajectories(reference, calls=CALLS, images=given)


def test_what_has_no_scheduler_and_calls_off_its_grid_are_refused(reference, images):
    with pytest.raises(InputError, match="model must be of the type DiffusionPipeline, not UNet2D"):
        data_trajectories(reference.unet, calls=CALLS, images=images)
    for scheduler, name in ((None, "missing"), (object(), "object")):
        pipe = copy.copy(reference)
        object.__setattr__(pipe, "scheduler", scheduler)
        with pytest.raises(
            InputError, match=f"model must have a scheduler .*DDIMPipeline is {name}"
        ):
            data_trajectories(pipe, calls=CALLS, images=images)
    reference.scheduler.set_timesteps(3)
    with pytest.raises(InputError, match="500 is not one of them"):
        data_trajectories(reference, calls=lambda pipe: pipe.unet(images, 500), images=images)
