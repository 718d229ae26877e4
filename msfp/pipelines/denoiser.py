"""The network inside a pipeline: where it is, its layers, and its timestep argument."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.config import LayerSettings, QuantizationConfig
from msfp.errors import InputError

COMPONENTS = ("unet", "transformer")
PlainLayer = nn.Linear | nn.Conv1d | nn.Conv2d
PLAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


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


def denoiser_of(pipe: DiffusionPipeline | nn.Module) -> nn.Module:
    """Return the network of a pipeline that predicts the noise, or the network itself.

    Raises:
        InputError: If it is a pipeline that has none, or something else.
    """
    if isinstance(pipe, nn.Module):
        return pipe
    network: nn.Module = getattr(pipe, denoiser_name(pipe))
    return network


def quantizable_layers(denoiser: nn.Module) -> dict[str, PlainLayer]:
    """Return every Linear, Conv1d and Conv2d by its dotted name, in definition order.

    Subclasses are left out: they may do anything.
    """
    return {
        name: module for name, module in denoiser.named_modules() if type(module) in PLAIN_LAYERS
    }


def settings_by_layer(
    denoiser: nn.Module, config: QuantizationConfig, executed: Iterable[str] | None = None
) -> dict[str, LayerSettings]:
    """Return what is to be searched for each layer that a config chooses.

    Args:
        denoiser: The full-precision network.
        config: What to search, and for which layers.
        executed: Names of layers in the order in which they run, where that is known.

    Returns:
        By name, in definition order.

    Raises:
        InputError: If the network is a layer itself, a glob of `include`, `exclude` or `overrides`
            matches no layer, no layer is chosen, an override is out of range, or the first or last
            layer is to have other bits and is not found.
    """
    layers = list(quantizable_layers(denoiser))
    kind = type(denoiser).__name__
    if "" in layers:  # the root itself, which no other layer can take the place of
        raise InputError(
            f"the network must hold its layers in a module, such as Sequential: it is a {kind}"
        )
    chosen = _matching(layers, "include", config.include, kind)
    chosen -= _matching(layers, "exclude", config.exclude, kind)
    if not chosen:
        raise InputError(f"{kind} has no layer that include and exclude leave to be quantized")
    ends = _ends(layers, config, None if executed is None else list(executed), kind)
    settings = {name: config.settings("first" if name in ends else "inner") for name in layers}
    for glob, changes in config.overrides.items():
        for name in _matching(layers, "overrides", (glob,), kind):
            settings[name] = settings[name]._replace(**changes)
            settings[name].check()
    return {name: settings[name] for name in layers if name in chosen}


def _matching(layers: list[str], argument: str, globs: tuple[str, ...], kind: str) -> set[str]:
    """Return the layers that a glob matches, by their own name or that of a module around them."""
    found: set[str] = set()
    for glob in globs:
        matches = {name for name in layers if any(fnmatchcase(n, glob) for n in _ancestors(name))}
        if not matches:
            raise InputError(f"{argument} has {glob!r}, which matches no layer of {kind}")
        found |= matches
    return found


def _ancestors(name: str) -> list[str]:
    """Return a dotted name and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _ends(
    layers: list[str], config: QuantizationConfig, executed: list[str] | None, kind: str
) -> set[str]:
    """Return the first and the last layer, where they have bits of their own."""
    if config.bits("first") == config.bits("inner"):
        return set()
    ends: set[str] = set()
    for end, globs, index in (("first", config.first, 0), ("last", config.last, -1)):
        named = {name for name in layers if any(fnmatchcase(name, glob) for glob in globs)}
        if not named and not executed:
            raise InputError(
                f"{kind} has no layer named {' or '.join(globs) or 'so'}, so first_last cannot "
                f"be applied: name the {end} layer in {end}, or set first_last to the other bits"
            )
        ends |= named or {executed[index]}  # type: ignore[index]
    return ends


def replace_layers(denoiser: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put layers in the place of others, wherever those occur."""
    for module in list(denoiser.modules()):
        for name, child in list(module._modules.items()):
            if child in replacements:
                setattr(module, name, replacements[child])


def timestep_of(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the timestep argument of one forward call as a tensor of shape (1,) or (batch,).

    Raises:
        InputError: If the forward has none.
    """
    timestep = timestep_or_none(denoiser, args, kwargs)
    if timestep is None:
        raise InputError(f"the forward of {type(denoiser).__name__} must be given a timestep")
    return timestep


def timestep_or_none(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor | None:
    """Return what `timestep_of` does, or None for a forward without a timestep."""
    bound = inspect.signature(denoiser.forward).bind(*args, **kwargs)
    timestep = bound.arguments.get("timestep")
    return None if timestep is None else torch.as_tensor(timestep).reshape(-1)


def has_timestep(denoiser: nn.Module) -> bool:
    """Return whether the forward of a network takes a timestep, as those of denoisers do."""
    return "timestep" in inspect.signature(denoiser.forward).parameters
