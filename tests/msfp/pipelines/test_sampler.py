import copy
import json

import pytest
import torch
from families import images, pipeline, safety_checker

from msfp import (
    InputError,
    QuantizationConfig,
    Sampler,
    load,
    pack,
    prompt_calls,
    quantize,
    save,
)


def test_an_image_depends_on_the_seed_and_not_on_how_many_are_sampled(reference):
    sampler = Sampler(steps=2, batch=4)
    many = sampler(reference, 6, seed=3)
    assert many.shape == (6, 1, 16, 16)
    assert 0 <= many.min() <= many.max() <= 1
    assert torch.equal(sampler(reference, 3, seed=3), many[:3])
    assert not torch.equal(sampler(reference, 3, seed=4), many[:3])


@pytest.mark.parametrize(
    ("family", "conditions", "argument"),
    [("dit", (3, 1, 2), "class_labels"), ("conditional_unet", ("a", "a a", "aa"), "prompt")],
)
def test_images_take_the_conditions_in_turn(family, conditions, argument, tmp_path):
    pipe = pipeline(family, tmp_path)
    sampler = Sampler(2, 2, conditions, guidance_scale=2.0)
    assert sampler.arguments(pipe, 2) == {
        argument: [conditions[2], conditions[0]], "guidance_scale": 2.0
    }  # fmt: skip
    images = sampler(pipe, 4, seed=0)
    assert images.shape[0] == 4
    assert images.shape[1] == 3
    assert 0 <= images.min() <= images.max() <= 1
    again = Sampler(2, 2, conditions[2:] + conditions[:1], 2.0)
    call = again.one_batch(pipe, seed=0, start=2)
    other = Sampler(2, 2, conditions[:2], 2.0).one_batch(pipe, seed=0, start=2)
    assert not torch.equal(call, other)


def checked_pipeline(folder):
    """A pipeline with a checker that takes every image for unsafe."""
    pipe = pipeline("conditional_unet", folder)
    kind, config = type(pipe), dict(pipe.components) | safety_checker()
    pipe = kind(**config, requires_safety_checker=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_safety_checker_is_not_run_and_stays(tmp_path):
    pipe = checked_pipeline(tmp_path / "vocabulary")
    assert not images(pipe).any()
    sampler = Sampler(2, 2, ("a", "a a"))
    unchecked = sampler(pipe, 2, seed=0)
    assert torch.equal(unchecked, sampler(pipeline("conditional_unet", tmp_path), 2, seed=0))
    assert unchecked.mean() > 0.1
    assert not images(pipe).any()
    quantize(pipe, QuantizationConfig(refine=None), calibration=sampler.calls(2, seed=0))
    pack(pipe.unet)
    save(pipe, tmp_path / "packed")
    index = json.loads((tmp_path / "packed" / "model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    loaded = load(tmp_path / "packed")
    assert not images(loaded).any()
    assert sampler(loaded, 2, seed=0).mean() > 0.1


def test_a_safety_checker_is_back_after_a_call_that_fails(tmp_path):
    pipe = checked_pipeline(tmp_path)
    checker = pipe.safety_checker
    with pytest.raises(InputError, match="prompts must be given"):
        Sampler(2, 2)(pipe, 2, seed=0)
    assert pipe.safety_checker is checker


class Conditional:
    def __call__(self, prompt):
        return prompt


class Labelled:
    def __call__(self, class_labels):
        return class_labels


class Unconditional:
    def __call__(self, batch_size=1):
        return batch_size


class Upscaler:
    def __call__(self, image):
        return image


@pytest.mark.parametrize(
    ("pipe", "sampler", "message"),
    [
        (Conditional(), Sampler(), "Conditional is conditional: prompts must be given"),
        (Conditional(), Sampler(conditions=(1,)), "Conditional takes prompts, not 1"),
        (Labelled(), Sampler(), "labels must be given"),
        (Labelled(), Sampler(conditions=("fox",)), "Labelled takes labels, not 'fox'"),
        (Unconditional(), Sampler(conditions=("fox",)), "Unconditional is unconditional"),
        (Unconditional(), Sampler(guidance_scale=2.0), "Unconditional takes none"),
        (Upscaler(), Sampler(), "batch must be 1, not 64: Upscaler makes one image in a call"),
    ],
)
def test_a_sampler_that_does_not_fit_the_pipeline_is_refused(pipe, sampler, message):
    with pytest.raises(InputError, match=message):
        sampler(pipe, 4, seed=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps must be between 1 and .* not -1"),
        ({"steps": 0}, "steps must be between 1 and .* not 0"),
        ({"steps": 2.5}, r"steps must be a whole number, not 2\.5"),
        ({"batch": 0}, "batch must be between 1 and .* not 0"),
        ({"batch": True}, "batch must be a whole number, not True"),
        ({"conditions": "fox"}, "conditions must be a list of prompts or labels, not 'fox'"),
        ({"conditions": ("a", 1)}, r"conditions must be a list .*, not \('a', 1\)"),
        ({"guidance_scale": "5"}, "guidance_scale must be a number, not '5'"),
    ],
)
def test_a_sampler_of_values_that_cannot_be_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Sampler(**values)


@pytest.mark.parametrize(
    ("count", "seed", "message"),
    [
        (0, 0, "count must be between 1 and .* not 0"),
        (2.0, 0, r"count must be a whole number, not 2\.0"),
        (2, None, "seed must be a whole number, not None"),
        (2, 2**50, f"seed must be between .* not {2**50}"),
    ],
)
def test_counts_and_seeds_that_cannot_be_are_refused_before_a_call(count, seed, message):
    sampler, pipe = Sampler(2, 2), Unconditional()
    for sample in (sampler.calls, lambda *given: sampler(pipe, *given)):
        with pytest.raises(InputError, match=message):
            sample(count, seed)


def test_the_largest_seeds_give_images(reference):
    for seed in (-(2**42), 2**42):
        assert Sampler(1, 1)(reference, 1, seed=seed).isfinite().all()


def test_a_dtype_that_a_pipeline_cannot_sample_in_is_refused(reference):
    pipe = copy.deepcopy(reference).to(torch.bfloat16)
    with pytest.raises(InputError, match=r"float32 or float16 for DDIMPipeline .* not bfloat16"):
        Sampler(2, 2)(pipe, 2, seed=0)


@pytest.mark.parametrize(
    ("conditions", "values", "message"),
    [
        (["a", 1], {}, r"conditions must be a list of prompts or labels, not \['a', 1\]"),
        ([], {}, r"conditions must hold at least one prompt or label, not \[\]"),
        (["a"], {"steps": 0}, "steps must be between 1 and .* not 0"),
        (["a"], {"seed": None}, "seed must be a whole number, not None"),
    ],
)
def test_prompt_calls_of_values_that_cannot_be_are_refused(conditions, values, message):
    with pytest.raises(InputError, match=message):
        prompt_calls(conditions, **values)


@pytest.mark.parametrize(
    ("pipe", "conditions", "message"),
    [
        (Unconditional(), ["fox"], "Unconditional is unconditional: prompts and labels must not"),
        (Labelled(), ["fox"], "Labelled takes labels, not 'fox'"),
        (Conditional(), [1], "Conditional takes prompts, not 1"),
    ],
)
def test_prompt_calls_that_do_not_fit_the_pipeline_are_refused(pipe, conditions, message):
    with pytest.raises(InputError, match=message):
        prompt_calls(conditions)[0](pipe)
