"""One forward of a denoiser in full precision and quantized at once, met at every layer.

The batch is given twice. The first half runs through each layer in full precision, the second
through the quantized layer, so that at a layer both are at hand: what it should give, and what it
reads once everything before it is quantized. Whoever visits the layer may change it before its
quantized half is computed. One forward thus corrects all layers in the order in which they run,
each on inputs that come from corrected predecessors. Between quantized layers a denoiser treats
samples one by one, so the halves do not mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from msfp.errors import InputError
from msfp.layers import QuantizedLayer, quantized_layers


@dataclass(frozen=True)
class Meeting:
    """A layer between its full-precision and its quantized half.

    Attributes:
        name: Dotted name of the layer in the denoiser.
        layer: The open layer; its weight and bias are still those of full precision.
        full_inputs: What it reads in full precision.
        inputs: What it reads behind quantized predecessors, before its input quantizer.
        outputs: What it gives in full precision, bias included.
    """

    name: str
    layer: QuantizedLayer
    full_inputs: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor


Visit = Callable[[Meeting], None]


def _forward(name: str, layer: QuantizedLayer, visit: Visit, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer to both halves of a batch, and let it be changed in between."""
    full, quantized = x.chunk(2)
    outputs = layer.compute(full, layer.weight)
    visit(Meeting(name, layer, full, quantized, outputs))
    return torch.cat([outputs, type(layer).forward(layer, quantized)])


@contextmanager
def paired(denoiser: nn.Module, visit: Visit) -> Iterator[None]:
    """Inside the block, run doubled batches through a denoiser: full precision, then quantized.

    Args:
        denoiser: Quantized by `quantize`, open and without LoRAs.
        visit: Called at each layer. What it puts into the layer holds for the full-precision
            half of a second forward too, so where it changes any there must be one forward only.

    Raises:
        InputError: If the denoiser has no quantized layer, or one that is sealed or has LoRAs.
    """
    layers = quantized_layers(denoiser)
    if not layers or any(x.entries is not None or x.hub is not None for x in layers.values()):
        raise InputError("denoiser must have been quantized and not yet sealed or fine-tuned")
    for name, layer in layers.items():
        # On the instance, where nn.Module looks first; the class keeps its own.
        layer.forward = partial(_forward, name, layer, visit)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward
