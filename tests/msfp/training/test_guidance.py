import functools

import pytest
import torch
from external import ldm_class

from msfp import Sampler, reference_pipeline
from msfp.training.guidance import guidance_branches


@pytest.mark.parametrize(
    "make", [ldm_class, functools.partial(reference_pipeline, "digits-transformer")]
)
def test_branches_of_classes_add_up_to_what_the_sampler_is_given(make):
    pipe, sampler = make(), Sampler(1, 2, (1, 3), 2.5)
    given, step = [], pipe.scheduler.step
    rows = []
    handle = pipe.denoiser.register_forward_hook(lambda _network, _args, y: rows.append(y.sample))

    def noted(prediction, *args, **kwargs):
        given.append(prediction)
        return step(prediction, *args, **kwargs)

    pipe.scheduler.step = noted
    sampler(pipe, 2, seed=0)
    handle.remove()
    (first, second), samples = guidance_branches(pipe, sampler, len(rows[0]))
    assert samples == 2
    combined = first * rows[0][:samples] + second * rows[0][samples:]
    torch.testing.assert_close(given[0], combined)
