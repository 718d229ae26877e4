"""Running a pipeline from seeded noise, and recording what its denoiser is asked on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.denoiser import denoiser_of, timestep_of

Progress = Callable[[int], None]
"""Called with the number of images that were just finished."""


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
        """Return `count` images of shape (count, channels, height, width) in [0, 1], float32."""
        images = []
        for start in range(0, count, self.batch):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
            output = pipe(
                batch_size=self.batch,
                generator=generator,
                num_inference_steps=self.steps,
                output_type="np",
            ).images
            images.append(torch.from_numpy(output).permute(0, 3, 1, 2)[: count - start])
            if progress is not None:
                progress(len(images[-1]))
        return torch.cat(images)


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
def recorded(denoiser: nn.Module) -> Iterator[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """Record (timestep, input, output) of every forward of a denoiser inside the block."""
    calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        prediction = output[0] if isinstance(output, tuple) else output.sample
        timestep = int(timestep_of(module, args, kwargs)[0])
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
    """Sample `count` images and return the path of the denoiser's inputs and outputs."""
    with recorded(denoiser_of(pipe)) as calls:
        sampler(pipe, count, seed, progress)
    rounds = [calls[i : i + sampler.steps] for i in range(0, len(calls), sampler.steps)]
    return Trajectories(
        timesteps=torch.tensor([timestep for timestep, _, _ in rounds[0]]),
        samples=torch.cat([torch.stack([x for _, x, _ in calls]) for calls in rounds], 1)[
            :, :count
        ],
        predictions=torch.cat([torch.stack([y for _, _, y in calls]) for calls in rounds], 1)[
            :, :count
        ],
    )
