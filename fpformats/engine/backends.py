"""The available kernels, and the inputs that each of them takes."""

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
    """A kind of input, and the code that computes it on this machine.

    Attributes:
        takes: The kind of input.
        runs: The code that computes it here.
        why: The reason why nothing faster is used, or empty.
    """

    takes: str
    runs: str
    why: str


def backends() -> list[Backend]:
    """List which code computes each kind of input on this machine.

    Returns:
        One entry for each kind of input.

    Example:
        >>> [backend.takes for backend in backends()][0]
        'NumPy arrays, torch tensors in host memory'
    """
    found = native.instruction_sets() if cpu.is_enabled() else []
    reason = "switched off" if native.instruction_sets() else "not built on this machine"
    compiled = f"compiled kernels, {native.library().chosen()}" if found else WHOLE_ARRAY
    has_triton = importlib.util.find_spec("triton") is not None
    return [
        Backend(
            "NumPy arrays, torch tensors in host memory",
            compiled,
            "" if found else f"the compiled kernels are {reason}",
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
    """Print which code computes each kind of input on this machine."""
    for takes, runs, why in backends():
        print(f"{takes}: {runs}{f' ({why})' if why else ''}")


def available() -> list[str]:
    """List the names of the back ends for host memory, the fastest first."""
    return [*native.instruction_sets(), "portable"]


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use one of the `available` back ends inside a ``with`` block, to test or to time it.

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
