"""Recorded forward calls in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from msfp.support.container import FileKind, check_fingerprint, read, write

FORWARDS = FileKind("recorded forwards", version=1)
PLAIN = (type(None), bool, int, float, str)
"""Types of values that JSON has."""

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Positional arguments, keyword arguments and output of a forward."""


def save_forwards(file: Path, calls: Sequence[Call], fingerprint: dict[str, Any]) -> bool:
    """Write forward calls to a file atomically; return whether they could be written.

    They cannot if an argument is neither a tensor nor a plain value, or a tree of such.

    Args:
        file: A .safetensors file, existing or new.
        calls: The forward calls, in order.
        fingerprint: Facts that must be equal for a run to use the file.

    Raises:
        InputError: If the file cannot be written.
    """
    tensors: dict[int, torch.Tensor] = {}
    try:
        trees = [_to_json(call, tensors) for call in calls]
    except TypeError:
        return False
    names = {key: str(index) for index, key in enumerate(tensors)}
    named = {names[key]: tensor.detach().cpu() for key, tensor in tensors.items()}
    facts = {
        "forwards": trees,
        "names": {str(key): name for key, name in names.items()},
        "places": {str(key): _place(tensor) for key, tensor in tensors.items()},
    }
    write(file, FORWARDS, named, facts, fingerprint)
    return True


def load_forwards(file: Path, fingerprint: dict[str, Any]) -> list[Call]:
    """Return the forward calls in a file that `save_forwards` wrote.

    Raises:
        InputError: If the file cannot be read, or has another fingerprint.
    """
    facts = check_fingerprint(file, FORWARDS, fingerprint).facts
    tensors = read(file, FORWARDS)[1]
    places = facts["places"]
    named = {
        key: _laid_out(tensors[name].to(places[key]["device"]), places[key]["stride"])
        for key, name in facts["names"].items()
    }
    return [_from_json(tree, named) for tree in facts["forwards"]]


def _to_json(tree: Any, tensors: dict[int, torch.Tensor]) -> Any:
    """Return a tree as JSON types, with numbers instead of its tensors, which are collected."""
    if isinstance(tree, torch.Tensor):
        tensors[id(tree)] = tree
        if tree.layout is not torch.strided:
            raise TypeError("a sparse tensor has no form in safetensors")
        return {"tensor": str(id(tree))}
    if isinstance(tree, PLAIN):
        return tree
    if isinstance(tree, tuple):
        return {"tuple": [_to_json(each, tensors) for each in tree]}
    if isinstance(tree, list):
        return [_to_json(each, tensors) for each in tree]
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _to_json(each, tensors) for key, each in tree.items()}}
    raise TypeError(f"{type(tree).__name__} has no form in JSON")


def _from_json(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the tree that `_to_json` described."""
    if isinstance(tree, list):
        return [_from_json(each, tensors) for each in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "tuple" in tree:
        return tuple(_from_json(each, tensors) for each in tree["tuple"])
    return {key: _from_json(each, tensors) for key, each in tree["dict"].items()}


def _place(x: torch.Tensor) -> dict[str, Any]:
    """Return the device of a tensor and how it lies in memory."""
    return {"device": str(x.device), "stride": list(x.stride())}


def _laid_out(x: torch.Tensor, stride: list[int]) -> torch.Tensor:
    """Return a copy with the strides that it had, at an address that is aligned as usual.

    Matrix products take the order of their sums from both.
    """
    found = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device)
    return found.copy_(x)
