import copy
import inspect

import pytest
import torch
from families import pipeline

from msfp import InputError, Sampler, reference_pipeline
from msfp.cli import options
from msfp.schedulers.samplers import SAMPLERS, use_sampler


def test_the_command_line_offers_the_samplers_that_there_are():
    assert list(SAMPLERS) == list(options.SAMPLERS)


@pytest.fixture(scope="module")
def expected(reference):
    return Sampler(30, 2)(reference, 2, seed=0)


@pytest.mark.parametrize("name", ["plms", "dpm++"])
def test_samplers_without_noise_of_their_own_end_in_the_images_of_ddim(name, expected):
    pipe = reference_pipeline()
    use_sampler(pipe, name)
    assert type(pipe.scheduler) is SAMPLERS[name][0]
    images = Sampler(30, 2)(pipe, 2, seed=0)
    assert (images - expected).abs().mean() < 0.02


def test_ddpm_ends_in_other_digits_from_its_own_noise(expected):
    pipe = reference_pipeline()
    use_sampler(pipe, "ddpm")
    images = Sampler(30, 2)(pipe, 2, seed=0)
    assert (images - expected).abs().mean() > 0.1
    assert (images < 0.1).float().mean() > 0.3  # the ground of a digit is dark and without noise


def test_ddim_is_what_the_reference_model_has_already(reference):
    pipe = copy.deepcopy(reference)
    use_sampler(pipe, "ddim")
    sampler = Sampler(3, 2)
    assert torch.equal(sampler(pipe, 2, seed=0), sampler(reference, 2, seed=0))


def test_pipelines_still_see_what_a_step_takes(reference):
    pipe = copy.deepcopy(reference)
    use_sampler(pipe, "dpm++")
    assert "generator" in inspect.signature(pipe.scheduler.step).parameters
    assert "eta" not in inspect.signature(pipe.scheduler.step).parameters


def test_a_sampler_that_cannot_follow_the_schedule_is_refused(tmp_path, reference):
    with pytest.raises(InputError, match="cannot replace FlowMatchEuler"):
        use_sampler(pipeline("flux", tmp_path), "ddim")
    with pytest.raises(InputError, match="sampler must be one of ddim, ddpm, plms, dpm"):
        use_sampler(reference, "euler")


def test_a_copied_pipeline_steps_its_own_sampler(reference):
    pipe, sampler = copy.deepcopy(reference), Sampler(4, 2)
    use_sampler(pipe, "plms")
    copied = copy.deepcopy(pipe)
    images = sampler(pipe, 2, seed=0)
    assert pipe.scheduler.counter == len(pipe.scheduler.timesteps)
    assert copied.scheduler.counter == 0
    assert torch.equal(sampler(copied, 2, seed=0), images)
