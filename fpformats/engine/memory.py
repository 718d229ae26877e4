"""Where arrays and tensors lie in memory, and whether a kernel may write there."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from fpformats.engine.arrays import assigned, is_unwatched_tensor
from fpformats.kernels import native

ARRAYS = (np.ndarray, np.memmap)
"""Types of arrays that are plain memory."""


def address(x: Any) -> int:
    """Give the address of a contiguous array or tensor."""
    return int(native.library().address(x) if isinstance(x, np.ndarray) else x.data_ptr())


def size(x: Any) -> int:
    """Give the number of elements of an array or tensor."""
    return int(x.size if isinstance(x, np.ndarray) else x.numel())


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Make an uninitialized array or tensor with the library and device of another."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    torch = sys.modules["torch"]
    return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)


def empty_like(x: Any, dtype: str | None = None) -> Any:
    """Make an uninitialized array or tensor with the shape and (tensors) strides of `x`.

    Args:
        x: The array or tensor.
        dtype: Name of a dtype; None for that of `x`.
    """
    if isinstance(x, np.ndarray):
        return np.empty(x.shape, x.dtype if dtype is None else dtype)
    torch = sys.modules["torch"]
    return torch.empty_like(x, dtype=None if dtype is None else getattr(torch, dtype))


def may_write(out: Any, source: Any, operands: list[Any], *, in_place: bool) -> bool:
    """Tell whether a kernel can write its results directly to `out`.

    Args:
        out: Where to write results, of their shape and dtype; None for a new array.
        source: The array or tensor that the kernel reads element by element, without gaps.
        operands: The others that it reads, contiguous, or None.
        in_place: Whether elements are as wide as results, so that `out` may be `source`.

    Returns:
        Whether `out` has the memory order of the results, and writing there overwrites nothing
        that is still to be read.
    """
    if not _is_orderly(out, source if in_place else None):
        return False
    start, length = _extent(out)
    for operand in (source, *operands):
        at, other = (0, 0) if operand is None else _extent(operand)
        overlaps = start < at + other and at < start + length
        if overlaps and not (in_place and operand is source and at == start):
            return False
    return True


def written(out: Any, result: Any) -> Any:
    """Give a kernel's result, in `out` if there is one, and tell autograd that `out` changed."""
    if out is not None and result is out and not isinstance(out, np.ndarray):
        sys.modules["torch"].autograd.graph.increment_version(out)
    return assigned(out, result)


def _is_orderly(out: Any, source: Any) -> bool:
    """Tell whether `out` is plain memory in the order of a source; row-major without a source."""
    if type(out) in ARRAYS:
        return bool(out.flags.c_contiguous and out.flags.aligned)
    if out is None or isinstance(out, np.ndarray) or not is_unwatched_tensor(out):
        return False
    return bool(out.is_contiguous() if source is None else out.stride() == source.stride())


def _extent(x: Any) -> tuple[int, int]:
    return address(x), size(x) * x.itemsize
