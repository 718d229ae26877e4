"""One forward of a denoiser in full precision and quantized at once, layer by layer.

The batch is given twice. The first half runs through each layer in full precision, the second
through the quantized layer, so that at a layer both are at hand: what it should give, and what it
reads once everything before it is quantized. Whoever visits the layer may change it before its
quantized half is computed. One forward thus corrects all layers in the order in which they run,
each on inputs that come from corrected predecessors. Between quantized layers a denoiser treats
samples one by one, so the halves do not mix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from msfp.layers.trainable import TrainableLayer, untrained_layers
from msfp.pipelines.trajectories import Trajectories


@dataclass(frozen=True)
class Visit:
    """A layer between its full-precision and its quantized half.

    Attributes:
        name: Dotted name of the layer in the denoiser.
        layer: The trainable layer; its weight and bias are still those of full precision.
        inputs: What it reads behind quantized predecessors, before its input quantizer.
        outputs: What it gives in full precision, bias and low-rank branch included.
    """

    name: str
    layer: TrainableLayer
    inputs: torch.Tensor
    outputs: torch.Tensor


Visitor = Callable[[Visit], None]


class _Halves:
    """A layer that is applied to both halves of a batch, and may be changed in between.

    Layers may run again, as the first time embedding of DiT does: they are visited once, and stay
    what they were for the full-precision half.
    """

    def __init__(self, name: str, layer: TrainableLayer, visitor: Visitor, batch: int) -> None:
        self.name, self.layer, self.visitor, self.batch = name, layer, visitor, batch
        self.weight, self.bias = layer.weight, layer.bias
        self.visited = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Stand in for the forward of the layer."""
        layer = self.layer
        if len(x) % (2 * self.batch):  # not of the samples: learned queries, or one for all
            return type(layer).forward(layer, x)
        full, quantized = x.chunk(2)
        outputs = layer.add_branch(full, layer.compute(full, self.weight, self.bias))
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
    """Run recorded samples through a denoiser in full precision and quantized, in one forward.

    Args:
        denoiser: Quantized by `quantize`, trainable and without LoRAs.
        trajectories: Recorded from the full-precision denoiser.
        step: Numbers of sampler steps, shape (batch,).
        row: Numbers of rows, shape (batch,).
        visitor: Called at each layer, the first time that it runs. What it puts into the layer
            holds for the quantized half alone.

    Returns:
        The predictions, those of full precision before those of the quantized denoiser.

    Raises:
        InputError: If the denoiser has no quantized layer, or one that is packed or has LoRAs.
    """
    layers = untrained_layers(denoiser)
    for name, layer in layers.items():
        # On the instance, where nn.Module looks first; the class keeps its own.
        layer.forward = _Halves(name, layer, visitor, len(step)).forward  # type: ignore[method-assign]
    try:
        return trajectories.predict(denoiser, step.repeat(2), row.repeat(2))
    finally:
        for layer in layers.values():
            del layer.forward
