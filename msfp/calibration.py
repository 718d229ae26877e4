"""Collecting the inputs of every layer while the pipeline samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import nn

from msfp.denoiser import denoiser_of, quantizable_layers
from msfp.sampling import Progress, Sampler

SAMPLES_PER_CALL = 4096


@dataclass(frozen=True)
class Calibration:
    """Values seen at the input of each layer over all timesteps.

    Attributes:
        inputs: For each layer's name a uniform random sample of its input values, float32, shape
            (n,), with the smallest and the largest value of every call included.
    """

    inputs: dict[str, NDArray[np.float32]]


class _Collector:
    """Draws values from the input of one layer at each call."""

    def __init__(self, seed: int) -> None:
        self.parts: list[torch.Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        values = args[0].detach().float().flatten().cpu()
        chosen = torch.randint(values.numel(), (SAMPLES_PER_CALL,), generator=self.generator)
        self.parts.append(torch.cat([values[chosen], torch.stack(values.aminmax())]))


def calibrate(
    pipe: DiffusionPipeline,
    sampler: Sampler,
    *,
    count: int = 64,
    seed: int = 1,
    progress: Progress | None = None,
) -> Calibration:
    """Run the pipeline with its own sampler and keep what every Conv2d and Linear reads.

    Args:
        pipe: A pipeline with a full-precision denoiser.
        sampler: The call to run; calibration covers the timesteps that it visits.
        count: Images to sample.
        seed: Seed of the noise and of the choice of values.
        progress: Called after each batch of images.

    Returns:
        The collected values, 4098 per layer and denoiser call.

    Raises:
        InputError: If the pipeline has no denoiser.
    """
    layers = quantizable_layers(denoiser_of(pipe))
    collectors = {name: _Collector(seed + index) for index, name in enumerate(layers)}
    handles = [layers[name].register_forward_pre_hook(collectors[name]) for name in layers]
    try:
        sampler(pipe, count, seed, progress)
    finally:
        for handle in handles:
            handle.remove()
    return Calibration({name: torch.cat(c.parts).numpy() for name, c in collectors.items()})
