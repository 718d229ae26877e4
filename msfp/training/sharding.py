"""Frozen weights divided among processes: each process holds a part and gathers the rest.

Trained parameters are small and stay whole in every process. A weight is whole while its layer
computes. Autograd keeps whole weights until the backward pass; with activation checkpointing, it
keeps only those of one block at a time.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import distributed, nn
from torch.nn.utils import parametrize

from msfp.layers.trainable import trainable_layers


class Gathered(nn.Module):
    """A parametrization that assembles a weight from the parts of all processes.

    Args:
        shape: Shape of the weight.
    """

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, part: torch.Tensor) -> torch.Tensor:
        """Return the weight; all processes must call this together."""
        whole = part.new_empty(distributed.get_world_size() * len(part))
        # torch 2.13 renamed the function.
        renamed = hasattr(distributed, "all_gather_single")
        gather = getattr(distributed, "all_gather_single" if renamed else "all_gather_into_tensor")
        gather(whole, part)
        return whole[: self.shape.numel()].view(self.shape)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a weight, padded to the same length in all processes."""
        size = -(-weight.numel() // distributed.get_world_size())
        part = weight.new_zeros(size)
        own = weight.flatten()[size * distributed.get_rank() :][:size]
        part[: len(own)] = own
        return part


def shard_weights(denoiser: nn.Module) -> dict[str, tuple[str, Gathered]]:
    """Divide the weight of every trainable layer among the processes, in place.

    Args:
        denoiser: Quantized and trainable; changed in place.

    Returns:
        For the name of each weight, the name of its part and its parametrization.
    """
    shards, layers = {}, trainable_layers(denoiser)
    owners = Counter(id(layer.weight) for layer in layers.values())
    for name, layer in layers.items():
        if owners[id(layer.weight)] > 1:
            continue  # a weight that layers share stays whole
        gathered = Gathered(layer.weight.shape)
        parametrize.register_parametrization(layer, "weight", gathered, unsafe=True)
        shards[f"{name}.weight"] = (f"{name}.parametrizations.weight.original", gathered)
    return shards
