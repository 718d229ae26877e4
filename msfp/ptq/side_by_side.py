"""One forward pass of a denoiser, in full precision and quantized side by side.

The batch contains each sample twice. Each layer computes the first half in full precision, and the
second half quantized. At each layer, both its full-precision outputs and its inputs from quantized
predecessors are therefore available. A visitor may change the layer before its quantized half is
computed. One forward pass thus corrects all layers in the order in which they run, each with inputs
from corrected predecessors. Between quantized layers a denoiser processes samples independently, so
the halves do not mix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from msfp.layers.trainable import TrainableLayer, untrained_layers
from msfp.pipelines.trajectories import Trajectories, WholeForwards
from msfp.ptq.lockstep import one_batch, run_in_lockstep
from msfp.support.hooks import hooked


@dataclass(frozen=True)
class Visit:
    """A layer after its full-precision half and before its quantized half.

    Attributes:
        name: Dotted name of the layer in the denoiser.
        layer: The trainable layer; its weight and bias are still those of full precision.
        inputs: Its inputs from quantized predecessors, before its input quantizer.
        outputs: Its full-precision outputs, bias and low-rank branch included.
    """

    name: str
    layer: TrainableLayer
    inputs: torch.Tensor
    outputs: torch.Tensor


Visitor = Callable[[Visit], None]


class _Halves:
    """A layer that is applied to both halves of a batch, and may be changed in between.

    A layer may run more than once, such as the first time embedding of DiT. It is visited only
    once. The full-precision half always uses its original weight and bias.
    """

    def __init__(self, name: str, layer: TrainableLayer, visitor: Visitor, batch: int) -> None:
        self.name, self.layer, self.visitor, self.batch = name, layer, visitor, batch
        self.weight, self.bias = layer.weight, layer.bias
        self.visited = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
        """Compute both halves; this replaces the forward method of the layer."""
        layer, x = self.layer, input
        if len(x) % (2 * self.batch):  # not of the samples: learned queries, or one row for all
            return type(layer).forward(layer, x)
        full, quantized = x.chunk(2)
        outputs = layer.add_branch(full, layer.compute(full, self.weight, self.bias))
        # As outputs of the quantized half lie in memory, so that later sums have the same order.
        outputs = layer.kind.channels_last(outputs)
        if not self.visited:
            self.visited = True
            self.visitor(Visit(self.name, layer, quantized, outputs))
        return torch.cat([outputs, type(layer).forward(layer, quantized)])


@torch.no_grad()
def visit_layers(
    denoiser: nn.Module,
    trajectories: Trajectories,
    step: torch.Tensor,
    row: torch.Tensor,
    visitor: Visitor,
) -> torch.Tensor:
    """Run recorded samples through a denoiser in full precision and quantized, in one forward pass.

    Args:
        denoiser: Quantized by `quantize`, trainable and without LoRAs.
        trajectories: Recorded from the full-precision denoiser.
        step: Indices of sampler steps, shape (batch,).
        row: Indices of rows, shape (batch,).
        visitor: Called at each layer, the first time that the layer runs. Its changes to the layer
            affect only the quantized half.

    Returns:
        The full-precision predictions, followed by those of the quantized denoiser.

    Raises:
        InputError: If the denoiser has no quantized layer, or has one that is packed or has LoRAs.
    """
    layers = untrained_layers(denoiser)
    if isinstance(trajectories, WholeForwards):
        return _visit_whole(denoiser, layers, trajectories, step, row, visitor)
    for name, layer in layers.items():
        # Set on the instance, where nn.Module looks first. The class keeps its own method.
        layer.forward = _Halves(name, layer, visitor, len(step)).forward  # type: ignore[method-assign]
    try:
        return trajectories.predict(denoiser, step.repeat(2), row.repeat(2))
    finally:
        for layer in layers.values():
            del layer.forward


MIXED = 0.05
"""Relative error of full-precision predictions from which on the halves must have been mixed."""


@torch.no_grad()
def halves_are_mixed(denoiser: nn.Module, trajectories: Trajectories) -> bool:
    """Return whether layers of a denoiser cannot be visited with both halves in one batch.

    A network may have its samples on another axis inside than on the first one. The halves are then
    mixed, which changes the full-precision predictions, or layers that depend on the sample are not
    visited. Two forwards of one sample each are tried.
    """
    layers, visited = untrained_layers(denoiser), set()
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    last = torch.tensor([n - 1 for n in trajectories.samples.shape[:2]])

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[name].append((args[0] if args else kwargs["input"]).detach())

        return hook

    for step, row in (torch.zeros(2, dtype=torch.int64)[:, None], last[:, None]):
        hooks = [
            layer.register_forward_pre_hook(note(name), with_kwargs=True)
            for name, layer in layers.items()
        ]
        with hooked(hooks):
            found = visit_layers(
                denoiser, trajectories, step, row, lambda visit: visited.add(visit.name)
            )
        wanted = trajectories.predictions[step, row].float()
        error = (found[:1].float() - wanted).square().sum()
        if not error <= MIXED**2 * wanted.square().sum():
            return True
    return any(_differ(inputs[name]) for name in layers if name not in visited)


def _differ(inputs: list[torch.Tensor]) -> bool:
    """Return whether the inputs of a layer in the second half of its runs are others."""
    half = len(inputs) // 2
    pairs = zip(inputs[:half], inputs[half:], strict=False)
    return any(one.shape != other.shape or not torch.equal(one, other) for one, other in pairs)


def _visit_whole(
    denoiser: nn.Module,
    layers: dict[str, TrainableLayer],
    trajectories: WholeForwards,
    step: torch.Tensor,
    row: torch.Tensor,
    visitor: Visitor,
) -> torch.Tensor:
    """Visit the layers with forwards that run one by one, as `visit_layers` does with one batch."""

    def forward(index: int) -> torch.Tensor:
        return trajectories.predict(denoiser, step[index, None], row[index, None])

    def visit(
        name: str, layer: TrainableLayer, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        batch = one_batch(layer, inputs, outputs)
        if batch is not None:
            visitor(Visit(name, layer, *batch))

    forwards = [functools.partial(forward, index) for index in range(len(step))]
    full, quantized = run_in_lockstep(layers, forwards, visit)
    return torch.cat(full + quantized)
