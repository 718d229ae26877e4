"""Fingerprints of runs, so that no run resumes from the state of a different one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

CHUNK = 1 << 24
"""The most numbers that are hashed at once."""
MAX_ROUNDING = 0.02
"""Largest relative difference of numbers of the same run, for bfloat16's rounding errors."""
MOST_SHOWN = 8
"""The longest list that an error message shows in full."""


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
        for some in value.detach().reshape(-1).split(CHUNK):
            found.update(some.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def difference(saved: dict[str, Any], run: dict[str, Any]) -> str | None:
    """Return the first difference of two fingerprints in words, or None if they are the same.

    Example:
        >>> difference({"seed": 0, "steps": 4}, {"seed": 1, "steps": 4})
        'its seed is 0, not 1'
        >>> difference({"errors": [1.0, 2.0]}, {"errors": [1.0, 2.001]}) is None
        True
    """
    for key in sorted(run.keys() | saved.keys()):
        if same(saved.get(key), run.get(key)):
            continue
        if key not in saved:
            return f"it has no {key}; this run has {_shown(run[key])}"
        if key not in run:
            return f"its {key} is {_shown(saved[key])}, which this run does not have"
        if _is_long(saved[key]) and _is_long(run[key]):
            return f"its {key} differ"
        return f"its {key} is {_shown(saved[key])}, not {_shown(run[key])}"
    return None


def _is_long(value: Any) -> bool:
    return isinstance(value, list) and len(value) > MOST_SHOWN


def _shown(value: Any) -> str:
    """Return a fact as an error message shows it."""
    return f"a list of {len(value)}" if _is_long(value) else str(value)


def same(one: Any, other: Any) -> bool:
    """Return whether two facts are equal; lists of floats may differ by `MAX_ROUNDING`.

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


def described(value: Any) -> Any:
    """Return a value as plain JSON types: images, arrays and tensors by their size and a digest.

    Example:
        >>> described({"strength": 0.5, "mask": torch.zeros(2, 3)})
        {'strength': 0.5, 'mask': 'Tensor (2, 3) 81f823a5443ab019'}
    """
    if isinstance(value, Mapping):
        return {str(name): described(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Image.Image | np.ndarray | torch.Tensor):
        numbers = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        return f"{type(value).__name__} {tuple(numbers.shape)} {digest([('', numbers)])}"
    return type(value).__name__
