"""Modules whose parameters always stay in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import nn


class Float32Module(nn.Module):
    """A module whose parameters follow `.to(device)`, but stay float32 under `.half()` etc."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda tensor: _moved(tensor, fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; a meta tensor becomes an uninitialized tensor."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
