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

from msfp.calibration import Calibration
from msfp.denoiser import quantizable_layers
from msfp.sampling import Trajectories


def _inputs(denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
    """Return what every Conv2d and Linear reads in one forward, by name."""
    read: dict[str, Any] = {}
    layers = quantizable_layers(denoiser)
    handles = [
        layer.register_forward_pre_hook(
            lambda _module, args, name=name: read.__setitem__(name, args[0].detach())
        )
        for name, layer in layers.items()
    ]
    try:
        denoiser(sample, timestep)
    finally:
        for handle in handles:
            handle.remove()
    return read


@torch.no_grad()
def time_inputs(denoiser: nn.Module, trajectories: Trajectories) -> dict[str, torch.Tensor]:
    """Return the inputs of every layer that depends on the timestep alone, at all timesteps.

    A layer is one of them if it reads the same for two different noisy samples, at each timestep.

    Args:
        denoiser: In full precision, or quantized.
        trajectories: Two at least; recorded from the full-precision denoiser with the sampler
            that will be used.

    Returns:
        By layer, in definition order, shape (timesteps, features).
    """
    first, second = (
        _inputs(denoiser, trajectories.samples[:, index], trajectories.timesteps)
        for index in (0, 1)
    )
    return {
        name: first[name]
        for name in quantizable_layers(denoiser)
        if name in first and torch.equal(first[name], second[name])
    }


def with_exact_times(
    calibration: Calibration, denoiser: nn.Module, trajectories: Trajectories
) -> Calibration:
    """Return a calibration whose values for time layers are all that there are, each once."""
    exact = time_inputs(denoiser, trajectories)
    values = {name: x.float().flatten().cpu().numpy() for name, x in exact.items()}
    return replace(calibration, inputs=calibration.inputs | values)
