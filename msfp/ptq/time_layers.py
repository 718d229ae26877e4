"""Layers that read the timestep and nothing else: all that they will ever read is known.

A sampler visits a finite set of timesteps, so the inputs of these layers (the time embedding and
its projections into each block) form a finite set too, and calibration can hold all of it
instead of a sample.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fpformats.fitting.histogram import Histogram
from msfp.pipelines.denoiser import quantizable_layers
from msfp.pipelines.trajectories import Trajectories
from msfp.search.calibration import Calibration


def _inputs(denoiser: nn.Module, trajectories: Trajectories, row: int) -> dict[str, torch.Tensor]:
    """Return what every layer reads from one row at all steps, by name."""
    read: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        return lambda _layer, args: read.__setitem__(name, args[0].detach())

    layers = quantizable_layers(denoiser)
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    step = torch.arange(len(trajectories.timesteps))
    try:
        trajectories.predict(denoiser, step, torch.full_like(step, row))
    finally:
        for handle in handles:
            handle.remove()
    return read


@torch.no_grad()
def time_inputs(denoiser: nn.Module, trajectories: Trajectories) -> dict[str, torch.Tensor]:
    """Return the inputs of every layer that depends on the timestep alone, at all timesteps.

    A layer is one of them if it reads the same, at each timestep, for the first row and for the
    last one with its samples negated, and not the same at all timesteps.

    Args:
        denoiser: In full precision.
        trajectories: Recorded from the denoiser with the sampler that will be used. Where there
            are conditions, those of the first and the last row must differ.

    Returns:
        By layer, in definition order, shape (timesteps, features).
    """
    first = _inputs(denoiser, trajectories, 0)
    # Both branches of guidance have the same samples, hence the sign.
    negated = replace(trajectories, samples=-trajectories.samples)
    second = _inputs(denoiser, negated, trajectories.samples.shape[1] - 1)
    return {
        name: first[name]
        for name in quantizable_layers(denoiser)
        if name in first
        and torch.equal(first[name], second[name])
        and (len(first[name]) == 1 or not torch.equal(first[name][0], first[name][-1]))
    }


def with_exact_times(
    calibration: Calibration, denoiser: nn.Module, trajectories: Trajectories
) -> Calibration:
    """Return a calibration whose numbers for time layers are all that there are, each once."""
    exact = {}
    for name, x in time_inputs(denoiser, trajectories).items():
        exact[name] = Histogram()
        exact[name].update(x)
    return replace(calibration, inputs=calibration.inputs | exact)
