"""Running a pipeline from seeded noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from msfp.errors import InputError

Progress = Callable[[int], None]
"""Called with the number of images, or of calls, that were just finished."""
PipelineCall = Callable[[Any], object]
"""A function that does something with a pipeline, or with a bare denoiser."""


@dataclass(frozen=True)
class Sampler:
    """An unconditional pipeline call with fixed step count and batch size.

    The noise of image i depends on the seed and the batch size alone, so two models sampled alike
    start from equal noise.

    Attributes:
        steps: Sampler steps.
        batch: Images in one call of the pipeline.
    """

    steps: int = 20
    batch: int = 64

    def __call__(
        self, pipe: DiffusionPipeline, count: int, seed: int, progress: Progress | None = None
    ) -> torch.Tensor:
        """Return `count` images of shape (count, channels, height, width) in [0, 1], float32.

        Raises:
            InputError: If the pipeline cannot be called without a condition.
        """
        images = []
        for start in range(0, count, self.batch):
            images.append(self.one_batch(pipe, seed, start)[: count - start])
            if progress is not None:
                progress(len(images[-1]))
        return torch.cat(images)

    def calls(self, count: int, seed: int) -> list[PipelineCall]:
        """Return the calls that sample `count` images, one for each batch.

        Example:
            >>> len(Sampler(steps=20, batch=8).calls(20, seed=0))
            3
        """
        return [
            partial(self.one_batch, seed=seed, start=start) for start in range(0, count, self.batch)
        ]

    def one_batch(self, pipe: DiffusionPipeline, seed: int, start: int) -> torch.Tensor:
        """Return the images from number `start` on, one batch of them."""
        if "batch_size" not in inspect.signature(pipe.__call__).parameters:
            raise InputError(
                f"{type(pipe).__name__} is not an unconditional pipeline: its call must take "
                "batch_size"
            )
        output = pipe(
            batch_size=self.batch,
            generator=torch.Generator().manual_seed(seed * 1_000_003 + start),
            num_inference_steps=self.steps,
            output_type="np",
        )
        return torch.from_numpy(output.images).permute(0, 3, 1, 2)


def prompt_calls(
    conditions: Sequence[str | int], *, steps: int = 20, seed: int = 0, **arguments: Any
) -> list[PipelineCall]:
    """Return calls of a conditional pipeline, one for each condition.

    Args:
        conditions: Prompts, or class labels for a pipeline that takes those.
        steps: Sampler steps.
        seed: Seed of the noise of the first call; each next one has the next.
        **arguments: More arguments of the call, such as `guidance_scale` and `height`.

    Raises:
        InputError: If there is no condition, or one string in place of a list of them.

    Example:
        >>> calls = prompt_calls(["a fox", "a red bicycle"], steps=20, guidance_scale=5.0)
        >>> len(calls)
        2
    """
    if isinstance(conditions, str) or not conditions:
        raise InputError(f"conditions must be a list of prompts or labels, not {conditions!r}")

    def call(pipe: DiffusionPipeline, condition: str | int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        options = {"output_type": "latent"} | arguments
        pipe([condition], num_inference_steps=steps, generator=generator, **options)

    return [
        partial(call, condition=condition, seed=seed + index)
        for index, condition in enumerate(conditions)
    ]
