"""Arguments of calls, by what a pipeline takes."""

import numpy as np
import pytest
import torch

from msfp import InputError, Sampler, prompt_calls
from msfp.pipelines.arguments import CallSettings, call_arguments


class Images:
    """What all the pipelines below return."""

    def items(self):
        return {"images": np.zeros((1, 4, 4, 3))}.items()


class Edit:
    def __call__(
        self, prompt=None, image=None, strength=0.8, num_inference_steps=50, generator=None,
        output_type="pil",
    ):  # fmt: skip
        self.given = {key: value for key, value in locals().items() if key != "self"}
        return Images()


class Variation:
    def __call__(self, image, num_images_per_prompt=1, num_inference_steps=50):
        self.given = {key: value for key, value in locals().items() if key != "self"}
        return Images()


class Cascade:
    def __call__(self, prompt, prior_num_inference_steps=25, num_inference_steps=10):
        self.given = {key: value for key, value in locals().items() if key != "self"}
        return Images()


class Latent:
    def __call__(self, prompt, output_type="pil"):
        self.given = prompt if output_type == "latent" else None


class Open:
    def __call__(self, prompt, **others):
        self.given = {"prompt": prompt} | others


def test_arguments_of_images_come_with_the_prompt_the_noise_and_the_steps():
    pipe = Edit()
    (call,) = prompt_calls(["a fox"], steps=3, seed=7, image="picture", strength=0.5)
    call(pipe)
    generator = pipe.given.pop("generator")
    assert generator.initial_seed() == 7
    assert pipe.given == {
        "prompt": "a fox", "image": "picture", "strength": 0.5, "num_inference_steps": 3,
        "output_type": "pil",
    }  # fmt: skip


def test_what_is_called_without_conditions_is_given_its_number_of_images():
    pipe = Variation()
    images = Sampler(steps=2, batch=3, extra={"image": "picture"}).one_batch(pipe, 0, 0)
    assert pipe.given == {"image": "picture", "num_images_per_prompt": 3, "num_inference_steps": 2}
    assert images.shape == (1, 3, 4, 4)
    calls = prompt_calls(image="picture", count=4, steps=5)
    assert len(calls) == 4
    calls[3](pipe)
    assert pipe.given["num_images_per_prompt"] == 1


def test_prompts_are_taken_in_turn():
    pipe = Cascade()
    calls = prompt_calls(["a fox", "a cat"], count=3, steps=4)
    for call, prompt in zip(calls, ("a fox", "a cat", "a fox"), strict=True):
        call(pipe)
        assert pipe.given["prompt"] == prompt


def test_every_stage_of_a_cascade_takes_the_steps_unless_it_is_given_its_own():
    pipe = Cascade()
    prompt_calls(["a fox"], steps=4)[0](pipe)
    assert pipe.given["prior_num_inference_steps"] == pipe.given["num_inference_steps"] == 4
    prompt_calls(["a fox"], steps=4, prior_num_inference_steps=9)[0](pipe)
    assert pipe.given["prior_num_inference_steps"] == 9


def test_latents_are_asked_of_a_pipeline_that_knows_them():
    pipe = Latent()
    prompt_calls(["a fox"])[0](pipe)
    assert pipe.given == "a fox"
    pipe = Edit()
    prompt_calls(["a fox"], image="picture")[0](pipe)
    assert pipe.given["output_type"] == "pil"


def test_a_list_of_prompts_is_given_as_a_list_and_one_as_itself():
    pipe = Edit()
    Sampler(steps=2, batch=2, conditions=("a fox", "a cat")).one_batch(pipe, 0, 0)
    assert pipe.given["prompt"] == ["a fox", "a cat"]
    Sampler(steps=2, batch=1, conditions=("a fox", "a cat")).one_batch(pipe, 0, 1)
    assert pipe.given["prompt"] == "a cat"


@pytest.mark.parametrize(
    ("pipe", "settings", "message"),
    [
        (
            Edit(),
            {"extra": {"mask": 1}},
            "mask must not be given: Edit takes prompt, image, streng",
        ),
        (Edit(), {"conditions": [3]}, "Edit takes prompts, not 3"),
        (Edit(), {}, "Edit is conditional: prompts must be given"),
        (Variation(), {"conditions": ["a fox"]}, "Variation is unconditional"),
        (Latent(), {"extra": {"prompt": "a"}, "count": 2}, "batch must be 1, not 2: Latent makes"),
    ],
)
def test_what_a_pipeline_does_not_take_is_refused(pipe, settings, message):
    plain = {"conditions": [], "count": 1, "steps": 2, "seed": 0, "output_type": "np"}
    with pytest.raises(InputError, match=message):
        call_arguments(pipe, CallSettings(**plain | settings))


def test_a_pipeline_that_takes_any_argument_is_given_it():
    pipe = Open()
    prompt_calls(["a fox"], anything=torch.ones(1))[0](pipe)
    assert list(pipe.given) == ["prompt", "anything"]


def test_further_arguments_must_be_a_table():
    with pytest.raises(InputError, match="extra must be a table of arguments by name, not 3"):
        Sampler(extra=3)


def test_what_a_pipeline_refuses_is_one_sentence():
    class Picky:
        def __call__(self, prompt, height=8):
            raise ValueError(f"height must be a multiple of 8, not {height}\n{prompt}")

    with pytest.raises(InputError, match=r"^Picky cannot be called so: height must .*, not 9$"):
        prompt_calls(["a fox"], height=9)[0](Picky())
