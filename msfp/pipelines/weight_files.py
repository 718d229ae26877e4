"""The safetensors files of a pipeline folder: what loading them takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from msfp.errors import InputError
from msfp.pipelines.packages import WEIGHTS, variant_of

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Dtypes as files name them."""
FLOATS = {"F64", *NAMES.values()}
"""Dtypes that loading casts."""


def cast_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Return the bytes that loading a pipeline makes in memory, because files have another dtype.

    Tensors of the same dtype stay in their files, from which the system reads them.

    Args:
        folder: A pipeline folder.
        dtype: The floating-point dtype in which it is loaded.

    Raises:
        InputError: If a file is not a whole safetensors file.
    """
    return sum(_cast_in(file, dtype) for file in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files that are loaded: of one variant in each component."""
    wanted = variant_of(folder)
    for part in sorted(each for each in folder.iterdir() if each.is_dir()):
        found = {file: WEIGHTS.fullmatch(file.name) for file in part.glob("*.safetensors")}
        variants = {file: each["variant"] for file, each in found.items() if each is not None}
        chosen = wanted if wanted in variants.values() else None
        yield from (file for file, variant in variants.items() if variant == chosen)


def _cast_in(file: Path, dtype: torch.dtype) -> int:
    total = 0
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                if part.get_dtype() in FLOATS and part.get_dtype() != NAMES[dtype]:
                    total += math.prod(part.get_shape()) * dtype.itemsize
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}") from error
    return total
