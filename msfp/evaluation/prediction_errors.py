"""Errors of the prediction on recorded trajectories."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories


@torch.no_grad()
def noise_errors(
    model: DiffusionPipeline | nn.Module, *, trajectories: Trajectories, batch: int = 64
) -> list[float]:
    """Return the mean squared error of the prediction at each timestep of held-out trajectories.

    The noise has unit variance, so an error of 0.01 is one hundredth of it. What is predicted
    beside it, such as a variance, does not count.

    Args:
        model: A pipeline or its denoiser, which predicts from the recorded inputs.
        trajectories: All rows of each timestep count.
        batch: The most rows in one forward. The errors depend on it by rounding alone.

    Raises:
        InputError: If `batch` is less than 1, or it is a pipeline without a denoiser.
    """
    denoiser = denoiser_of(model)
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    rows = torch.arange(trajectories.samples.shape[1])

    def error(step: int, some: torch.Tensor) -> float:
        predicted = trajectories.predict(denoiser, torch.full_like(some, step), some)
        off = trajectories.of_sample(predicted - trajectories.predictions[step, some])
        return off.square().mean().item()

    # Weighted by shares of the rows, so that those of one forward have the weight 1 exactly.
    return [
        sum(len(some) / len(rows) * error(step, some) for some in rows.split(batch))
        for step in range(len(trajectories.timesteps))
    ]
