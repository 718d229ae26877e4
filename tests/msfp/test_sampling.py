import pytest
import torch

from msfp import InputError, Sampler


def test_an_image_depends_on_the_seed_and_not_on_how_many_are_sampled(reference):
    sampler = Sampler(steps=2, batch=4)
    many = sampler(reference, 6, seed=3)
    assert many.shape == (6, 1, 16, 16)
    assert 0 <= many.min() <= many.max() <= 1
    assert torch.equal(sampler(reference, 3, seed=3), many[:3])
    assert not torch.equal(sampler(reference, 3, seed=4), many[:3])


def test_a_conditional_pipeline_is_refused():
    class Conditional:
        def __call__(self, prompt):
            return prompt

    with pytest.raises(InputError, match="Conditional is not an unconditional pipeline"):
        Sampler(2, 4)(Conditional(), 4, seed=0)
