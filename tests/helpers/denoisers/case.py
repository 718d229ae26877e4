"""What a small denoiser of the sweep is: arguments of its class, and of one forward."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import diffusers
import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """A small denoiser of a class that diffusers exports.

    Attributes:
        config: Keyword arguments of the class.
        inputs: A function of a number of rows that returns the keyword arguments of a forward.
            Random tensors are made by `noise`, so that equal calls give equal arguments. Floating
            point tensors are float32; `Case.call` casts them.
        rows: Number of rows of the usual call; 1 for a class that takes no more.
        reason: Why the class cannot be run, as one sentence; empty if it can.
        saved: Whether diffusers itself saves and loads it.
        trained: Whether it has gradients on a CPU.
    """

    config: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[int], dict[str, Any]] = dict
    rows: int = 2
    reason: str = ""
    saved: bool = True
    trained: bool = True

    def make(self, name: str) -> nn.Module:
        """Return the denoiser of random weights, in evaluation; none of its weights is zero."""
        torch.manual_seed(0)
        denoiser: nn.Module = getattr(diffusers, name)(**self.config).eval()
        with torch.no_grad():
            for parameter in denoiser.parameters():
                if parameter.is_floating_point() and not parameter.any():
                    parameter.normal_(std=0.1)
        return denoiser

    def call(self, denoiser: nn.Module, rows: int | None = None) -> Any:
        """Return what the denoiser returns for the call of some rows, in the denoiser's dtype."""
        dtype = next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
        arguments = cast(self.inputs(self.rows if rows is None else rows), dtype)
        with torch.no_grad():
            return denoiser(**arguments)


def the(module: str, name: str) -> Any:
    """Return what a module of transformers has, imported at its use: not every version has it."""
    return getattr(import_module(f"diffusers.models.transformers.{module}"), name)


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Return normal random numbers, equal for equal arguments.

    Rows are drawn one by one, so that the first rows are equal for every number of rows.
    """
    rows = [
        torch.randn(*shape[1:], generator=torch.Generator().manual_seed(1000 * seed + row))
        for row in range(shape[0])
    ]
    return torch.stack(rows)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a tree of arguments with its floating-point tensors in a dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(each, dtype) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cast(each, dtype) for each in value)
    return value
