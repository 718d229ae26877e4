"""The back ends there are, and which of them computes a product."""

from __future__ import annotations

import torch

from msfp.layers.execution.float_path import FloatPath
from msfp.layers.execution.protocol import Backend, Product

BACKENDS: list[Backend] = [FloatPath()]
"""The back ends, the fastest first; the last one takes everything."""


def product(layer: Product, x: torch.Tensor, adapter: int) -> torch.Tensor:
    """Return the product of a quantized layer by the first back end that takes it.

    Args:
        layer: A quantized layer, trainable or packed.
        x: Its input, not rounded yet.
        adapter: Of the hub, 0 where there is one.
    """
    for backend in BACKENDS[:-1]:
        if backend.takes(layer, x):
            return backend.product(layer, x, adapter)
    return BACKENDS[-1].product(layer, x, adapter)
