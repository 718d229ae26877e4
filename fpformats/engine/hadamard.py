"""Hadamard transforms by the compiled kernels."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from fpformats.engine import cpu, memory
from fpformats.kernels import native


def transform(x: Any, size: int, axis: int, factor: float) -> Any:
    """Transform groups along an axis; None if no kernel takes `x`.

    Args:
        x: Array or tensor of float32 or float64 that needs no gradient.
        size: Size of the groups, a power of two that divides the length of the axis.
        axis: The axis, at least 0.
        factor: Multiplies the sums.

    Returns:
        A new array or tensor.
    """
    if not cpu.takes(x):
        return None
    last = _moved(x, axis, -1)
    if _is_contiguous(last):  # channels last in memory
        return _moved(_transformed(last, size, 1, factor), -1, axis)
    inner = math.prod(x.shape[axis + 1 :])
    contiguous = np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()
    return _transformed(contiguous, size, inner, factor)


def _transformed(x: Any, size: int, inner: int, factor: float) -> Any:
    out = memory.empty_like(x)
    count = memory.size(x)
    if count:
        native.library().transform(
            memory.address(x),
            memory.address(out),
            count // (size * inner),
            size,
            inner,
            factor,
            "64" in str(x.dtype),
            native.threads_for(count),
        )
    return out


def _is_contiguous(x: Any) -> bool:
    return bool(x.flags.c_contiguous if isinstance(x, np.ndarray) else x.is_contiguous())


def _moved(x: Any, source: int, target: int) -> Any:
    if isinstance(x, np.ndarray):
        return np.moveaxis(x, source, target)
    return sys.modules["torch"].movedim(x, source, target)
