"""Trees of arguments and outputs: tensors in dictionaries, lists and tuples, and other values."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a tree in order.

    Example:
        >>> [len(x) for x in tensors_in({"a": torch.ones(2), "b": [torch.ones(3), None]})]
        [2, 3]
    """
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


def mapped(tree: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Return a tree with a function applied to its tensors, and copies of its other values.

    Subclasses of dictionaries become dictionaries, and named tuples become tuples.

    Example:
        >>> mapped({"a": (torch.ones(2), 3)}, len)
        {'a': (2, 3)}
    """
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [mapped(value, function) for value in tree]
    if isinstance(tree, tuple):
        return tuple(mapped(value, function) for value in tree)
    return copy.deepcopy(tree)


class Copies:
    """Copies of tensors; a tensor that comes again unchanged has one copy."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor, without its gradient."""
        version = -1 if x.is_inference() else x._version
        known = self._known.get(id(x))
        if known is not None and known[0]() is x and known[1] == version != -1:
            return known[2]
        made = x.detach().clone()
        self._known[id(x)] = weakref.ref(x), version, made
        return made
