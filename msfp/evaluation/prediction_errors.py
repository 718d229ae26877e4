"""Errors of the prediction on recorded trajectories."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories
from msfp.support.checks import check_type, check_whole


@torch.no_grad()
def noise_errors(
    model: DiffusionPipeline | nn.Module, *, trajectories: Trajectories, batch: int = 64
) -> list[float]:
    """Return the mean squared error of the prediction at each timestep of held-out trajectories.

    The noise has unit variance, so an error of 0.01 is one hundredth of the noise. Other outputs of
    the denoiser, such as a variance, are ignored.

    Args:
        model: A pipeline or its denoiser, which predicts from the recorded inputs.
        trajectories: The trajectories; all rows of each timestep are used.
        batch: Largest number of rows in one forward pass. It changes the errors only by rounding.

    Raises:
        InputError: If `batch` is less than 1, an argument has the wrong type, or the pipeline has
            no denoiser.
    """
    denoiser = denoiser_of(model)
    check_type("trajectories", trajectories, Trajectories)
    check_whole("batch", batch, 1)
    rows = torch.arange(trajectories.samples.shape[1])

    def error(step: int, some: torch.Tensor) -> float:
        predicted = trajectories.predict(denoiser, torch.full_like(some, step), some)
        off = trajectories.of_sample(predicted - trajectories.predictions[step, some])
        return off.square().mean().item()

    # Weighted by their share of the rows, so that a single forward pass has the weight 1 exactly.
    return [
        sum(len(some) / len(rows) * error(step, some) for some in rows.split(batch))
        for step in range(len(trajectories.timesteps))
    ]
