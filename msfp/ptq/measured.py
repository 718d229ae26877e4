"""How far the predictions of a quantized denoiser are from those that were recorded."""

from __future__ import annotations

import torch
from torch import nn

from msfp.checkpoint.model_card import Measured
from msfp.pipelines.trajectories import Trajectories
from msfp.support.decibels import sqnr

SAMPLES = 8
"""Most samples that are predicted."""


@torch.no_grad()
def measured_on(denoiser: nn.Module, path: Trajectories) -> Measured:
    """Return the error of a denoiser on samples at equal distances along recorded trajectories.

    Args:
        denoiser: The quantized denoiser.
        path: Trajectories of the full-precision denoiser.
    """
    steps, rows = path.samples.shape[:2]
    count = min(SAMPLES, steps * rows)
    chosen = torch.linspace(0, steps * rows - 1, count).round().long()
    step, row = chosen // rows, chosen % rows
    recorded = path.of_sample(path.predictions[step, row]).double()
    noise = path.of_sample(path.predict(denoiser, step, row)).double() - recorded
    found = sqnr(recorded.square().sum().item(), noise.square().sum().item())
    return Measured(found, count)
