"""Running a pipeline from seeded noise, and recording what its denoiser is asked on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.denoiser import denoiser_of, timestep_of
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


@dataclass(frozen=True)
class Trajectories:
    """What a denoiser saw and said along a sampler's path.

    Attributes:
        timesteps: Shape (steps,), in the sampler's order.
        samples: Noisy inputs x_t, shape (steps, count, channels, height, width).
        predictions: The denoiser's outputs there, same shape.
    """

    timesteps: torch.Tensor
    samples: torch.Tensor
    predictions: torch.Tensor


@contextmanager
def recorded(denoiser: nn.Module) -> Iterator[list[tuple[float, torch.Tensor, torch.Tensor]]]:
    """Record (timestep, input, output) of every forward of a denoiser inside the block."""
    calls: list[tuple[float, torch.Tensor, torch.Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        prediction = output[0] if isinstance(output, tuple) else output.sample
        timestep = timestep_of(module, args, kwargs)[0].item()
        calls.append((timestep, args[0].detach().clone(), prediction.detach().clone()))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def record_trajectories(
    pipe: DiffusionPipeline,
    sampler: Sampler,
    count: int,
    seed: int,
    progress: Progress | None = None,
) -> Trajectories:
    """Sample `count` images and return the path of the denoiser's inputs and outputs.

    Raises:
        InputError: If the sampler does not take every batch through the same timesteps.
    """
    batches = []
    for start in range(0, count, sampler.batch):
        with recorded(denoiser_of(pipe)) as calls:
            sampler.one_batch(pipe, seed, start)
        batches.append(calls)
        if progress is not None:
            progress(min(sampler.batch, count - start))
    timesteps = [timestep for timestep, _, _ in batches[0]]
    if any([timestep for timestep, _, _ in calls] != timesteps for calls in batches):
        raise InputError("the sampler must take every batch through the same timesteps")
    return Trajectories(
        torch.tensor(timesteps),
        torch.cat([torch.stack([x for _, x, _ in calls]) for calls in batches], 1)[:, :count],
        torch.cat([torch.stack([y for _, _, y in calls]) for calls in batches], 1)[:, :count],
    )
