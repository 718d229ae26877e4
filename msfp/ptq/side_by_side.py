"""A denoiser's recorded samples in full precision and quantized, side by side.

Samples run in forwards of a fixed size, in full precision and quantized. At each layer, both its
full-precision outputs and its inputs from quantized predecessors are therefore available. A visitor
may change the layer before its quantized runs. One pass thus corrects all layers in the order in
which they run, each with inputs from corrected predecessors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from msfp.layers.trainable import TrainableLayer, full_precision, untrained_layers
from msfp.pipelines.trajectories import Trajectories, WholeForwards
from msfp.ptq.lockstep import Visitor, run_in_lockstep
from msfp.support.hooks import hooked
from msfp.support.paging import PageFolder
from msfp.support.trees import mapped

TOGETHER = 2**16
"""Numbers of the samples that run in one forward, if a sample does not have more."""


def forwards_of(trajectories: Trajectories, step: torch.Tensor) -> list[slice]:
    """Return which of some chosen samples run in one forward.

    It depends on nothing but the samples, so that results do not either.

    Args:
        trajectories: The recorded samples.
        step: Indices of sampler steps, one for each chosen sample.
    """
    numbers = trajectories.samples[0, 0].numel()
    whole = isinstance(trajectories, WholeForwards)
    size = 1 if whole else max(1, TOGETHER // max(1, numbers))
    return [slice(start, start + size) for start in range(0, len(step), size)]


@torch.no_grad()
def visit_layers(
    denoiser: nn.Module,
    trajectories: Trajectories,
    step: torch.Tensor,
    row: torch.Tensor,
    visitor: Visitor,
    *,
    pages: PageFolder | None = None,
) -> torch.Tensor:
    """Run recorded samples through a denoiser in full precision and quantized, layer by layer.

    Args:
        denoiser: Quantized by `quantize`, trainable and without LoRAs.
        trajectories: Recorded from the full-precision denoiser.
        step: Indices of sampler steps, shape (batch,).
        row: Indices of rows, shape (batch,).
        visitor: Called at each layer whose input depends on the samples, the first time that it
            runs. Its changes to the layer affect only the quantized runs.
        pages: Where the numbers of waiting forwards go, and full-precision weights after the visit;
            None keeps them in memory.

    Returns:
        The full-precision predictions, followed by those of the quantized denoiser.

    Raises:
        InputError: If the denoiser has no quantized layer, or has one that is packed or has LoRAs.
    """
    layers = untrained_layers(denoiser)
    dependent = dependent_layers(denoiser, trajectories)

    def forward(part: slice) -> torch.Tensor:
        return trajectories.predict(denoiser, step[part], row[part])

    forwards = [functools.partial(forward, part) for part in forwards_of(trajectories, step)]
    visited = {name: layers[name] for name in dependent}
    full, quantized = run_in_lockstep(denoiser, visited, forwards, visitor, pages)
    return torch.cat(full + quantized)


@torch.no_grad()
def dependent_layers(denoiser: nn.Module, trajectories: Trajectories) -> list[str]:
    """Return the quantized layers whose input depends on the samples, in the order of their runs.

    The first recorded sample runs alone, and so does the last one with noise in all arguments. A
    layer that reads the same numbers in both forwards, such as learned queries, has nothing to be
    refined by.
    """
    layers = untrained_layers(denoiser)
    first = torch.zeros(1, dtype=torch.int64)
    last = torch.tensor([[n - 1] for n in trajectories.samples.shape[:2]])
    with full_precision(denoiser):
        one = _inputs(denoiser, layers, trajectories, first, first)
        with hooked([denoiser.register_forward_pre_hook(_add_noise, with_kwargs=True)]):
            other = _inputs(denoiser, layers, trajectories, *last)
    return [name for name in one | other if one.get(name) != other.get(name)]


def _add_noise(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add noise to all arguments that are floating-point tensors."""
    generator = torch.Generator().manual_seed(0)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            return x
        return x + torch.randn(x.shape, generator=generator).to(x)

    return mapped(args, noisy), mapped(kwargs, noisy)


def _inputs(
    denoiser: nn.Module,
    layers: dict[str, TrainableLayer],
    trajectories: Trajectories,
    step: torch.Tensor,
    row: torch.Tensor,
) -> dict[str, list[Any]]:
    """Return what identifies the inputs of each layer in a forward, in the order of runs."""
    found: dict[str, list[Any]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: torch.Tensor = args[0] if args else kwargs["input"]
            sums = (x.sum(dtype=torch.float64), x.abs().sum(dtype=torch.float64))
            found.setdefault(name, []).append((tuple(x.shape), *(each.item() for each in sums)))

        return hook

    hooks = (
        layer.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, layer in layers.items()
    )
    with hooked(hooks):
        trajectories.predict(denoiser, step, row)
    return found
