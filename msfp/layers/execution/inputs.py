"""What integer back ends ask of inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import _C, nn

TYPES = (torch.Tensor, nn.Parameter)


def is_unwatched(x: torch.Tensor) -> bool:
    """Return whether a tensor is plain, and nothing intercepts operations on it."""
    return (
        type(x) in TYPES
        and not _C._len_torch_dispatch_stack()
        and not _C._len_torch_function_stack()
        and not torch.compiler.is_compiling()
        and x.layout is torch.strided
        and _C._get_tracing_state() is None
        and not _C._functorch.is_functorch_wrapped_tensor(x)
    )


def padded(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return an input with the padding of a convolution that does not pad with zeros."""
    if layer.padding_mode == "zeros":
        return x
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
