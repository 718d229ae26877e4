"""The network inside a pipeline: where it is, its layers, and its timestep argument."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError

COMPONENTS = ("unet", "transformer")
FIRST_LAYERS = ("conv_in",)
LAST_LAYERS = ("conv_out",)


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """Return the name of the pipeline component that predicts the noise.

    Raises:
        InputError: If the pipeline has none.
    """
    components = getattr(pipe, "components", {})
    for name in COMPONENTS:
        if isinstance(components.get(name), nn.Module):
            return name
    raise InputError(
        f"{type(pipe).__name__} has no denoiser: one of its components must be "
        f"{' or '.join(COMPONENTS)}, it has {sorted(components) or 'none'}"
    )


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """Return the network of the pipeline that predicts the noise."""
    network: nn.Module = getattr(pipe, denoiser_name(pipe))
    return network


def quantizable_layers(denoiser: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return every Conv2d and Linear of a denoiser by its dotted name, in definition order."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def position(name: str) -> Literal["first", "inner", "last"]:
    """Return whether a layer reads the noisy sample, writes the prediction, or stands between."""
    if name in FIRST_LAYERS:
        return "first"
    return "last" if name in LAST_LAYERS else "inner"


def replace_layer(denoiser: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one with that dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(denoiser.get_submodule(parent), child, layer)


def timestep_of(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the timestep argument of one forward call as a tensor of shape (1,) or (batch,)."""
    bound = inspect.signature(denoiser.forward).bind(*args, **kwargs)
    return torch.as_tensor(bound.arguments["timestep"]).reshape(-1)
