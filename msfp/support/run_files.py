"""Files that a long run goes on from, and what tells whether one is of the same run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msfp.errors import InputError
from msfp.support.files import sync_folder, usual_mode

CHUNK = 1 << 24
"""Numbers that are hashed at once."""
MAX_ROUNDING = 0.02
"""How far numbers of one run may be from each other, relative to them: bfloat16's rounding."""
MOST_SHOWN = 8
"""Numbers that a message shows of a list."""


def save_run(
    file: Path, kind: str, tensors: Mapping[str, torch.Tensor], description: dict[str, Any]
) -> None:
    """Write a file so that a process killed at any moment leaves the old one or the new.

    Args:
        file: A safetensors file, which may exist.
        kind: What it is, as "a state of fine-tuning".
        tensors: By name.
        description: Plain JSON types; what makes a run another run as its `run`.

    Raises:
        InputError: If the file cannot be written.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # Of one name, so that what a killed process leaves, safetensors' own files included, goes with
    # the next one.
    folder = file.with_name(f".{file.name}.partial")
    partial = folder / file.name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file(whole, partial, metadata={kind: json.dumps(description)})
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.chmod(usual_mode(folder))
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync_folder(file.parent)


def description_of(file: Path, kind: str) -> dict[str, Any]:
    """Return what a file says of itself.

    Args:
        file: That `save_run` wrote.
        kind: What it must be.

    Raises:
        InputError: If the file is something else.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            told = (opened.metadata() or {}).get(kind)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is not {kind}: {error}") from error
    if told is None:
        raise InputError(f"{file} is not {kind}, or of an earlier version")
    description: dict[str, Any] = json.loads(told)
    return description


def described(file: Path, kind: str, run: dict[str, Any]) -> dict[str, Any]:
    """Return what a file says of itself, if that is of a run.

    Args:
        file: That `save_run` wrote.
        kind: What it must be.
        run: What makes a run another run.

    Raises:
        InputError: If the file is something else, or of another run.
    """
    description = description_of(file, kind)
    saved = description["run"]
    for key in sorted(run.keys() | saved.keys()):
        if not same(saved.get(key), run.get(key)):
            raise InputError(f"{file} is the state of another run: {_difference(key, saved, run)}")
    return description


def saved_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name."""
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def part(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with that of a part and a slash, without these.

    Example:
        >>> part("a", {"a/b": torch.zeros(1), "c/b": torch.ones(1)})
        {'b': tensor([0.])}
    """
    start = f"{name}/"
    return {key[len(start) :]: each for key, each in tensors.items() if key.startswith(start)}


@torch.no_grad()
def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the first 16 digits of the SHA-256 of named tensors.

    Example:
        >>> digest([("a", torch.zeros(2))]) == digest([("a", torch.zeros(2))])
        True
        >>> digest([("a", torch.zeros(2))]) == digest([("b", torch.zeros(2))])
        False
    """
    found = hashlib.sha256()
    for name, value in tensors:
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        for part in value.detach().reshape(-1).split(CHUNK):
            found.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def same(one: Any, other: Any) -> bool:
    """Return whether two facts are one, lists of numbers up to `MAX_ROUNDING`.

    Example:
        >>> same([1.0, 2.0], [1.0, 2.001]), same([1.0, 2.0], [1.0, 2.1]), same(1, None)
        (True, False, False)
    """
    if one == other:
        return True
    lists = all(isinstance(each, list) and each for each in (one, other))
    if not lists or len(one) != len(other):
        return False
    if not all(isinstance(each, float) for each in (*one, *other)):
        return False
    first, second = torch.tensor(one), torch.tensor(other)
    return bool((first - second).norm() <= MAX_ROUNDING * first.norm())


def _difference(key: str, saved: dict[str, Any], run: dict[str, Any]) -> str:
    """Say how a fact of two runs differs."""
    if key not in saved:
        return f"it does not say its {key}, as one of an earlier version"
    if key not in run:
        return f"its {key} is {saved[key]}, which this one does not have"
    if isinstance(saved[key], list) and len(saved[key]) > MOST_SHOWN:
        return f"its {key} are others"
    return f"its {key} is {saved[key]}, not {run[key]}"
