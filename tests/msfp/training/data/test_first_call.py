import pytest
import torch
from families import pipeline

from msfp import Sampler
from msfp.training.data.first_call import first_call


def test_the_denoiser_is_not_run_and_the_pipeline_can_be_called_again(tmp_path):
    pipe, sampler = pipeline("conditional_unet", tmp_path), Sampler(3, 2, ("a",), 2.0)
    expected = sampler(pipe, 2, seed=0)
    ran = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    scheduler, rows = first_call(pipe, sampler.calls(2, seed=0)[0])
    handle.remove()
    assert not ran
    assert scheduler is not pipe.scheduler
    assert len(scheduler.timesteps) == 3
    assert rows == 4  # two images in two branches
    assert torch.equal(sampler(pipe, 2, seed=0), expected)


def test_an_error_of_the_pipeline_stays_one(tmp_path):
    pipe = pipeline("unet", tmp_path)
    with pytest.raises(ZeroDivisionError):
        first_call(pipe, lambda _: 1 // 0)
    assert not pipe.unet._forward_pre_hooks
