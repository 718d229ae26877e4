"""What does the work: which kernels there are, and which of them take which input."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from fpformats.engine import cpu
from fpformats.kernels import native

if TYPE_CHECKING:
    from collections.abc import Iterator

WHOLE_ARRAY = "whole-array operations"


class Backend(NamedTuple):
    """A way of computing.

    Attributes:
        takes: What it is used for.
        runs: What computes it here.
        why: Why not something faster, or empty.
    """

    takes: str
    runs: str
    why: str


def backends() -> list[Backend]:
    """Tell what computes here, by where the input is.

    Returns:
        One entry for each kind of input.

    Example:
        >>> [backend.takes for backend in backends()][0]
        'NumPy arrays, torch tensors in host memory'
    """
    found = native.instruction_sets() if cpu.is_enabled() else []
    compiled = f"compiled kernels, {native.library().chosen()}" if found else WHOLE_ARRAY
    has_triton = importlib.util.find_spec("triton") is not None
    return [
        Backend(
            "NumPy arrays, torch tensors in host memory",
            compiled,
            "" if found else "the compiled kernels are not there, or not used",
        ),
        Backend(
            "torch tensors on a CUDA device",
            "Triton kernels" if has_triton else WHOLE_ARRAY,
            _no_cuda() if has_triton else "triton is not installed",
        ),
        Backend("torch.compile, torch.func, other devices", WHOLE_ARRAY, ""),
        Backend("formats of more than 8 exponent or 23 mantissa bits", WHOLE_ARRAY, ""),
    ]


def show_backends() -> None:
    """Print what computes here, by where the input is."""
    for takes, runs, why in backends():
        print(f"{takes}: {runs}{f' ({why})' if why else ''}")


def available() -> list[str]:
    """List the ways of computing in host memory by name, the fastest first."""
    return [*native.instruction_sets(), "portable"]


@contextmanager
def using(name: str) -> Iterator[None]:
    """Compute in one of the `available` ways for a while, to test or to time it.

    Args:
        name: An instruction set, or "portable" for whole-array operations.

    Raises:
        ValueError: If it is not available.

    Example:
        >>> from fpformats import E2M1, quantize
        >>> with using("portable"):
        ...     quantize(1.27, E2M1)
        1.5
    """
    if name not in available():
        raise ValueError(f"name is {name!r}; allowed here: {', '.join(available())}")
    if name == "portable":
        with cpu.disabled():
            yield
        return
    library = native.library()
    before = library.chosen()
    library.choose(name)
    try:
        yield
    finally:
        library.choose(before)


def _no_cuda() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device is there"
