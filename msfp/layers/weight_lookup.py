"""The `state_dict` of a packed denoiser, in which other code finds the weights of packed layers.

diffusers looks up `LAYER.weight` there, to compare shapes, before it loads a LoRA into Flux.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from msfp.layers.packed import PackedLayer, packed_layers


class StateDict(OrderedDict[str, torch.Tensor]):
    """The tensors of a denoiser; a look-up also finds the weights of packed layers.

    These are not among its keys and values, so they are neither saved nor loaded.

    Attributes:
        layers: The packed layers by name; absent in a copy.
    """

    layers: dict[str, PackedLayer]

    def __missing__(self, name: str) -> torch.Tensor:
        layers, (layer, _, leaf) = vars(self).get("layers", {}), name.rpartition(".")
        for known in (layer, f"{layer}.base_layer"):  # PEFT puts the layer into another
            if leaf == "weight" and known in layers:
                weight: torch.Tensor = layers[known].weight
                return weight
        raise KeyError(name)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies, and what torch.save writes, are plain.
        attributes = {name: value for name, value in vars(self).items() if name != "layers"}
        return OrderedDict, (), attributes, None, iter(self.items())


def add_weight_lookup(denoiser: nn.Module) -> None:
    """Let the `state_dict` of a denoiser be a `StateDict` from now on."""
    if _with_weights not in denoiser._state_dict_hooks.values():
        denoiser._register_state_dict_hook(_with_weights)


def _with_weights(
    denoiser: nn.Module, tensors: OrderedDict[str, torch.Tensor], *_: Any
) -> StateDict:
    """Return the tensors of a denoiser, and of modules around it, as a `StateDict`."""
    named = StateDict(tensors)
    vars(named).update(vars(tensors))
    named.layers = packed_layers(denoiser)
    return named
