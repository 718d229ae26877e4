"""The networks inside a pipeline: finding them, and their timestep argument."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence, Sized
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.support.checks import check_choice, check_names, check_type

T = TypeVar("T")
Networks = dict[str, nn.Module]
"""Networks by the name of their component; "" for a network without a pipeline."""

COMPONENTS = (
    "prior", "prior_prior", "unet", "image_unet", "text_unet", "transformer", "transformer_2",
    "unconditional_transformer", "decoder", "super_res_first", "super_res_last",
)  # fmt: skip
"""Names of the components of diffusers' pipelines that are denoisers, in the order of stages."""
TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio", "sigma", "decoder_noise_time")
"""Names of the timestep in the forward of denoisers, the first ones first."""
SELECTED = "_msfp_selected"
"""The attribute of a pipeline that names the denoisers that `select_denoisers` was given."""


def networks_of(model: DiffusionPipeline | nn.Module, argument: str = "model") -> Networks:
    """Return the networks of a pipeline by component, or the model itself, named "".

    Args:
        model: A pipeline or a network. If denoisers are selected, only these are returned.
        argument: Name of the argument in error messages.

    Raises:
        InputError: If the model is neither a pipeline nor a network.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    if not hasattr(model, "components"):
        kind = type(model).__name__
        raise InputError(f"{argument} must be a pipeline of diffusers or its denoiser, not {kind}")
    selected = getattr(model, SELECTED, None)
    parts = model.components
    names = parts if selected is None else selected
    return {name: parts[name] for name in names if isinstance(parts[name], nn.Module)}


def denoisers_of(model: DiffusionPipeline | nn.Module, argument: str = "model") -> Networks:
    """Return the noise-predicting networks of a pipeline by component, or the model itself.

    Args:
        model: A pipeline or a network.
        argument: Name of the argument in error messages.

    Raises:
        InputError: If the model is a pipeline without a denoiser, or neither a pipeline nor a
            network.
    """
    networks = networks_of(model, argument)
    if isinstance(model, nn.Module) or getattr(model, SELECTED, None) is not None:
        return networks
    found = {name: networks[name] for name in COMPONENTS if name in networks}
    if not found:
        raise InputError(
            f"{type(model).__name__} has no denoiser, such as a unet or a transformer: its "
            f"components are {sorted(model.components) or 'none'}"
        )
    return found


def denoiser_name(pipe: DiffusionPipeline, argument: str = "model") -> str:
    """Return the name of the pipeline component that predicts the noise.

    Raises:
        InputError: If the pipeline has no such component, or several and none is selected.
    """
    names = list(denoisers_of(pipe, argument))
    if len(names) > 1:
        raise InputError(
            f"{argument} has {len(names)} denoisers, {' and '.join(names)}: select one, as in "
            f"msfp.select_denoisers({argument}, {names[0]!r})"
        )
    return names[0]


def denoiser_of(model: DiffusionPipeline | nn.Module, argument: str = "model") -> nn.Module:
    """Return the noise-predicting network of a pipeline, or the model itself if it is a network.

    Args:
        model: A pipeline or a network.
        argument: Name of the argument in error messages.

    Raises:
        InputError: If the model is a pipeline without a denoiser or with several, or neither a
            pipeline nor a network.
    """
    if isinstance(model, nn.Module):
        return model
    return denoisers_of(model, argument)[denoiser_name(model, argument)]


def select_denoisers(model: DiffusionPipeline, names: str | Sequence[str]) -> DiffusionPipeline:
    """Return the same pipeline, of which msfp takes only the named components as denoisers.

    The result shares all components with `model`, so what is quantized in one is quantized in both.
    Functions for a single network, such as `finetune`, need this if a pipeline has two denoisers.
    It also selects networks that are no denoisers, such as a ControlNet.

    Args:
        model: A pipeline.
        names: Name of a component that is a network, or several names.

    Raises:
        InputError: If a component is not there or is not a network.

    Example:
        >>> from msfp import reference_pipeline
        >>> list(denoisers_of(select_denoisers(reference_pipeline(), "unet")))
        ['unet']
    """
    check_type("model", model, DiffusionPipeline)
    networks = [k for k, v in model.components.items() if isinstance(v, nn.Module)]
    given = check_names("names", [names] if isinstance(names, str) else names)
    if not given:
        raise InputError(f"names must hold at least one of {', '.join(networks)}")
    for name in given:
        check_choice("names", name, networks)
    selected = copy.copy(model)
    vars(selected)[SELECTED] = given
    return selected


def scheduler_of(pipe: DiffusionPipeline) -> Any:
    """Return the scheduler that steps the denoiser of a pipeline.

    A pipeline of several stages has a `prior_scheduler` beside its `prior_prior`, and so on.

    Raises:
        InputError: If the pipeline has none, or has no denoiser or several.
    """
    words = denoiser_name(pipe).split("_")
    stages = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
    for name in (*(f"{stage}_scheduler" for stage in stages), "scheduler"):
        found = pipe.components.get(name)
        if found is not None:
            return found
    raise InputError(f"{type(pipe).__name__} has no scheduler for its {denoiser_name(pipe)}")


def by_name(networks: Networks, layers_of: Callable[[nn.Module], dict[str, T]]) -> dict[str, T]:
    """Return the layers of several networks by the names that `named` gives them.

    Args:
        networks: The networks by component.
        layers_of: A function that returns the layers of a network by name.
    """
    return {
        named(component, layer, networks): found
        for component, network in networks.items()
        for layer, found in layers_of(network).items()
    }


def named(component: str, layer: str, networks: Sized) -> str:
    """Return the name of a layer, after the name of its network if there are several.

    Example:
        >>> named("unet", "conv_in", {"unet": nn.Module(), "prior": nn.Module()})
        'unet.conv_in'
    """
    return f"{component}.{layer}" if len(networks) > 1 else layer


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
