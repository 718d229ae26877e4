"""Tensors as a file holds them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

BRANCH = (".branch_down", ".branch_up")
"""How the names of the factors of a branch end."""


def as_stored(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a denoiser's tensors with the factors of branches in float16 where that is exact.

    Example:
        >>> factor = torch.tensor([0.1]).half().float()
        >>> [each.dtype for each in as_stored({"a.branch_up": factor, "a.bias": factor}).values()]
        [torch.float16, torch.float32]
    """
    return {
        name: tensor.half() if name.endswith(BRANCH) and _is_half(tensor) else tensor
        for name, tensor in tensors.items()
    }


def _is_half(tensor: torch.Tensor) -> bool:
    """Return whether float16 holds all numbers of a float32 tensor."""
    return tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor)
