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

from msfp.errors import InputError
from msfp.layers.trainable import TrainableLayer, full_precision, untrained_layers
from msfp.pipelines.trajectories import Trajectories, WholeForwards
from msfp.ptq.lockstep import Visitor, run_in_lockstep
from msfp.support.hooks import hooked
from msfp.support.paging import PageFolder
from msfp.support.trees import mapped

MOST_ERROR = 0.05
"""Largest relative difference of full-precision predictions, with and without waiting."""
TOGETHER = 2**16
"""Numbers of the samples that run in one forward, if a sample does not have more."""


def forwards_of(
    trajectories: Trajectories, step: torch.Tensor, batch: int | None = None
) -> list[slice]:
    """Return which of some chosen samples run in one forward.

    It depends on nothing but the samples and the batch, so that results do not either.

    Args:
        trajectories: The recorded samples.
        step: Indices of sampler steps, one for each chosen sample.
        batch: Largest number of samples in a forward; None for as many as have `TOGETHER` numbers.
    """
    numbers = trajectories.samples[0, 0].numel()
    whole = isinstance(trajectories, WholeForwards)
    size = 1 if whole else batch or max(1, TOGETHER // max(1, numbers))
    return [slice(start, start + size) for start in range(0, len(step), size)]


@torch.no_grad()
def visit_layers(
    denoiser: nn.Module,
    trajectories: Trajectories,
    step: torch.Tensor,
    row: torch.Tensor,
    visitor: Visitor,
    *,
    batch: int | None = None,
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
        batch: Largest number of samples in a forward, as for `RefinementConfig`.
        pages: Where the numbers of waiting forwards go, and full-precision weights after the visit;
            None keeps them in memory.

    Returns:
        The full-precision predictions, followed by those of the quantized denoiser.

    Raises:
        InputError: If the denoiser has no quantized layer, or has one that is packed or has LoRAs.
    """
    layers = untrained_layers(denoiser)
    _, constant = probed_layers(denoiser, trajectories)
    visited = {name: layer for name, layer in layers.items() if name not in constant}
    forwards = [
        functools.partial(_predict, denoiser, trajectories, step[part], row[part])
        for part in forwards_of(trajectories, step, batch)
    ]
    full, quantized = run_in_lockstep(denoiser, visited, forwards, visitor, pages)
    return torch.cat(full + quantized)


def _predict(
    denoiser: nn.Module, trajectories: Trajectories, step: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    return trajectories.predict(denoiser, step, row)


class SharedValuesError(InputError):
    """Forwards of a denoiser cannot wait for each other."""


@torch.no_grad()
def check_forwards(denoiser: nn.Module, trajectories: Trajectories) -> None:
    """Raise SharedValuesError unless forwards can wait for each other at each layer.

    They cannot if modules keep values of a forward for a later layer of it. The first and the last
    recorded sample are tried.
    """
    layers, last = untrained_layers(denoiser), _last(trajectories)
    chosen = [torch.zeros_like(last), last]
    forwards = [functools.partial(_predict, denoiser, trajectories, *each) for each in chosen]
    full, _ = run_in_lockstep(denoiser, layers, forwards, lambda _visit: None)
    with full_precision(denoiser):
        alone = [forward() for forward in forwards]
    for one, other in zip(full, alone, strict=True):
        found, wanted = (each.double().nan_to_num() for each in (one, other))
        if (found - wanted).norm() > MOST_ERROR * wanted.norm():
            raise SharedValuesError(
                f"{type(denoiser).__name__} cannot be refined: its modules keep values of a "
                "forward for later layers, so that forwards cannot wait for each other; give "
                "refine=None"
            )


@torch.no_grad()
def probed_layers(denoiser: nn.Module, trajectories: Trajectories) -> tuple[list[str], set[str]]:
    """Return which quantized layers ran, in their order, and which of them read constants.

    The first recorded sample runs alone, and so does the last one with noise in all arguments. A
    layer that reads the same numbers in both forwards, such as learned queries, has nothing to be
    refined by. Experts may run in neither.
    """
    layers, last = untrained_layers(denoiser), _last(trajectories)
    with full_precision(denoiser):
        one = _inputs(denoiser, layers, trajectories, *torch.zeros_like(last))
        with hooked([denoiser.register_forward_pre_hook(_add_noise, with_kwargs=True)]):
            other = _inputs(denoiser, layers, trajectories, *last)
    return list(one | other), {name for name in one if one[name] == other.get(name)}


def _last(trajectories: Trajectories) -> torch.Tensor:
    """Return the step and the row of the last recorded sample, shape (2, 1)."""
    return torch.tensor([[n - 1] for n in trajectories.samples.shape[:2]])


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
            if not x.numel():  # an expert without tokens
                return
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
