"""The list of back ends, and the choice of one for a product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from msfp.layers.execution.float_path import FloatPath
from msfp.layers.execution.grids import IntegerGrids
from msfp.layers.execution.onednn import OneDNN
from msfp.layers.execution.protocol import Backend, ProductLayer
from msfp.layers.execution.triton_path import TritonPath

BACKENDS: list[Backend] = [OneDNN(), TritonPath(), FloatPath()]
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
            y = backend.product(layer, x, adapter)
            if y is not None:
                return y
    y = BACKENDS[-1].product(layer, x, adapter)
    assert y is not None  # noqa: S101 - the last one computes everything
    return y


def runs_on_integers(layer: ProductLayer) -> bool:
    """Return whether a packed layer is computed on integer units where it is now."""
    grids = layer.integer_grids
    return isinstance(grids, IntegerGrids) and any(
        backend.runs(grids, layer.weight_step.device) for backend in BACKENDS[:-1]
    )


@contextmanager
def floats_only() -> Iterator[None]:
    """Compute all products in floating point inside a ``with`` block, to test or to time it."""
    before = BACKENDS[:]
    BACKENDS[:] = before[-1:]
    try:
        yield
    finally:
        BACKENDS[:] = before
