"""Memory and disk that a quantization needs, as far as the shapes of weights tell, and refusals."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from msfp.errors import InputError
from msfp.layers.kinds import PlainLayer, groups_of
from msfp.ptq.refinement import MOST_COLUMNS
from msfp.support.memory import available_bytes, free_disk

KEPT, PAGED = 2, 2
"""How often weights are in the state of a run, and in the files of offloading."""
FLOAT = 4
"""Bytes of a float32 number, in which refinement computes."""
FACTORS = 3
"""How often the second moments of a layer are in memory while they are factored."""
SEARCHED = 4
"""How often the weight of a layer is in memory, in float32, while it is searched."""


def shape_of(layer: PlainLayer) -> tuple[int, int, int]:
    """Return the groups, rows and columns of a layer's matrices."""
    groups, weight = groups_of(layer), layer.weight
    return groups, len(weight) // groups, weight[0].numel()


def moment_bytes(layers: Iterable[PlainLayer]) -> int:
    """Return the bytes of the largest second moments of some layers."""
    shapes = map(shape_of, layers)
    return max(FLOAT * groups * min(columns, MOST_COLUMNS) ** 2 for groups, _, columns in shapes)


def widest_bytes(layers: Iterable[PlainLayer]) -> int:
    """Return the float32 bytes of the largest weight of some layers."""
    return max(FLOAT * layer.weight.numel() for layer in layers)


def check_memory(
    layers: Sequence[PlainLayer], *, refined: bool, offload: bool, copied: int = 0
) -> None:
    """Raise InputError if what is computed beside the loaded model does not fit the memory.

    Args:
        layers: The layers that are quantized, of the largest denoiser.
        refined: Whether weights are refined.
        offload: Whether weights that wait are in files.
        copied: Bytes of parameters that are copied to memory, unless they are offloaded.
    """
    free = available_bytes()
    if free is None or not layers:
        return
    least = SEARCHED * widest_bytes(layers)
    if refined:
        least = max(least, FACTORS * moment_bytes(layers))
    needed = least
    if not offload:
        needed += copied + refined * sum(layer.weight.nbytes for layer in layers)
    if needed > free:
        fits = least <= free < needed
        advice = f": give offload=True, which needs {least / 1e9:.1f} GB" if fits else ""
        raise InputError(
            f"quantizing needs {needed / 1e9:.1f} GB of memory beside the model, of which "
            f"{free / 1e9:.1f} GB are free{advice}"
        )


def check_disk(weights: int, state: str | Path | None, *, offload: bool) -> None:
    """Raise InputError if the files of refinement do not fit on the disk.

    Args:
        weights: Bytes of the weights that are refined.
        state: The state folder; None for none.
        offload: Whether weights that wait are in files.
    """
    folder = Path(tempfile.gettempdir() if state is None else state)
    needed = weights * (KEPT * (state is not None) + PAGED * offload)
    there = sum(file.stat().st_size for file in folder.rglob("*")) if state is not None else 0
    free = free_disk(folder)
    if needed > free + there:
        raise InputError(
            f"{'state' if state is not None else 'offload'} needs {needed / 1e9:.1f} GB on the "
            f"disk of {folder}, of which {(free + there) / 1e9:.1f} GB are free"
        )
