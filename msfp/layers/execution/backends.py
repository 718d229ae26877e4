"""The list of back ends, and the choice of one for a product."""

from __future__ import annotations

import torch

from msfp.layers.execution.float_path import FloatPath
from msfp.layers.execution.protocol import Backend, ProductLayer

BACKENDS: list[Backend] = [FloatPath()]
"""The back ends, fastest first. The last one supports all layers and inputs."""


def product(layer: ProductLayer, x: torch.Tensor, adapter: int) -> torch.Tensor:
    """Return the output of a quantized layer, computed by the first back end that supports it.

    Args:
        layer: A quantized layer, trainable or packed.
        x: The input before rounding.
        adapter: Number of the adapter in the hub, 0 if there is only one.
    """
    for backend in BACKENDS[:-1]:
        if backend.takes(layer, x):
            return backend.product(layer, x, adapter)
    return BACKENDS[-1].product(layer, x, adapter)
