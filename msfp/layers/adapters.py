"""Adapters of PEFT, such as LoRAs, around the layers of a network: merging them into its weights.

Checkpoints have no place for adapters, and searches read plain layers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from msfp.errors import InputError
from msfp.layers.selection import replace_layers

LOADED = ("peft_config", "_hf_peft_config_loaded")
"""Attributes in which diffusers notes the adapters of a network."""


def adapter_layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers that PEFT put around others, by name, without those inside another."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Any] = {}
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, BaseTunerLayer) and not inside:
            found[name] = module
    return found


def refuse_adapters(name: str, network: nn.Module) -> None:
    """Raise InputError if a network, the value of the argument `name`, has adapters."""
    if adapter_layers(network):
        raise InputError(f"{name} has LoRAs loaded: call unload_lora_weights() first")


def merged_names(network: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the adapters that are in effect, and of the others."""
    layers = adapter_layers(network).values()
    known = {name for layer in layers for part in _around(layer) for name in _names(part)}
    used = {name for layer in layers for part in _around(layer) for name in _used(part)}
    return sorted(used), sorted(known - used)


def merge_adapters(network: nn.Module) -> Callable[[], None]:
    """Merge the adapters that are in effect into the weights, with their scales, in place.

    The network then has plain layers, and no adapters. The merged weights are copies.

    Args:
        network: A network in full precision.

    Returns:
        A function that puts the adapters back, and the weights of before.

    Raises:
        InputError: If PEFT cannot merge an adapter. The network is then unchanged.
    """
    layers = adapter_layers(network)
    merged = {layer: _merged(name, layer) for name, layer in layers.items()}
    replace_layers(network, merged)
    notes = {name: vars(network).pop(name) for name in LOADED if name in vars(network)}

    def undo() -> None:
        replace_layers(network, {plain: layer for layer, plain in merged.items()})
        vars(network).update(notes)

    return undo


@contextmanager
def merged_adapters(network: nn.Module) -> Iterator[None]:
    """Merge the adapters of a network as `merge_adapters` does, inside the `with` block."""
    undo = merge_adapters(network)
    try:
        yield
    finally:
        undo()


def _around(layer: Any) -> list[Any]:
    """Return a layer of PEFT and those inside it, the outermost first, without the plain one."""
    parts = []
    while hasattr(layer, "base_layer"):
        parts.append(layer)
        layer = layer.base_layer
    return parts


def _names(layer: Any) -> set[str]:
    """Return the names of the adapters of one layer."""
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part)}


def _used(layer: Any) -> set[str]:
    """Return those that its output depends on: of merged ones PEFT adds no others."""
    if layer.disable_adapters:
        return set()
    return set(layer.merged_adapters or layer.active_adapters) & _names(layer)


def _merged(name: str, layer: Any) -> nn.Module:
    """Return the plain layer with the adapters in its weight; the layer itself is unchanged."""
    own = copy.deepcopy(layer)
    try:
        for part in _around(own):
            if part.disable_adapters and part.merged:
                part.unmerge()
            elif not part.disable_adapters and not part.merged:
                part.merge(safe_merge=True)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        names = ", ".join(sorted(_used(layer)))
        why = str(error) or type(error).__name__
        raise InputError(
            f"the adapters of layer {name!r} ({names}) cannot be merged into its weight: {why}"
        ) from error
    plain: nn.Module = own.get_base_layer()
    return plain
