"""The network inside a pipeline: finding it, and its timestep argument."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError

COMPONENTS = ("unet", "transformer")
TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio", "sigma", "decoder_noise_time")
"""Names of the timestep in the forward of denoisers, the first ones first."""


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """Return the name of the pipeline component that predicts the noise.

    Raises:
        InputError: If the pipeline has no such component.
    """
    components = getattr(pipe, "components", {})
    for name in COMPONENTS:
        if isinstance(components.get(name), nn.Module):
            return name
    raise InputError(
        f"{type(pipe).__name__} has no denoiser: one of its components must be "
        f"{' or '.join(COMPONENTS)}, it has {sorted(components) or 'none'}"
    )


def denoiser_of(model: DiffusionPipeline | nn.Module, argument: str = "model") -> nn.Module:
    """Return the noise-predicting network of a pipeline, or the model itself if it is a network.

    Args:
        model: A pipeline or a network.
        argument: Name of the argument in error messages.

    Raises:
        InputError: If the model is a pipeline without a denoiser, or neither a pipeline nor a
            network.
    """
    if isinstance(model, nn.Module):
        return model
    if not hasattr(model, "components"):
        kind = type(model).__name__
        raise InputError(f"{argument} must be a pipeline of diffusers or its denoiser, not {kind}")
    network: nn.Module = getattr(model, denoiser_name(model))
    return network


def timestep_name(denoiser: nn.Module) -> str | None:
    """Return the name of the argument of a denoiser's forward that is its timestep, or None.

    Example:
        >>> from diffusers import UNet2DModel
        >>> timestep_name(UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
        ...     up_block_types=("UpBlock2D",)))
        'timestep'
    """
    names = list(inspect.signature(denoiser.forward).parameters)
    for known in TIMESTEPS:
        if known in names:
            return known
    return next((name for name in names if "timestep" in name), None)


def timestep_of(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the timestep argument of one forward call as a tensor of shape (1,) or (batch,).

    Raises:
        InputError: If the call has no timestep.
    """
    timestep = timestep_or_none(denoiser, args, kwargs)
    if timestep is None:
        raise InputError(f"the forward of {type(denoiser).__name__} must be given a timestep")
    return timestep


def timestep_or_none(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor | None:
    """Return the timestep as `timestep_of` does, or None for a call without a timestep.

    The timesteps of frames or tokens are in one row, too.
    """
    name = timestep_name(denoiser)
    bound = inspect.signature(denoiser.forward).bind(*args, **kwargs)
    timestep = bound.arguments.get(name) if name is not None else None
    if not isinstance(timestep, torch.Tensor | int | float):
        return None
    timesteps = torch.as_tensor(timestep).reshape(-1)
    return timesteps if timesteps.numel() else None
