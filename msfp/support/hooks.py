"""Hooks of modules that are removed when a block ends, with or without an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol


class Handle(Protocol):
    """The handle that `register_forward_hook` and similar methods of a module return."""

    def remove(self) -> None:
        """Remove the hook."""


@contextmanager
def hooked(handles: Iterable[Handle]) -> Iterator[None]:
    """Keep hooks registered inside the block, and remove them after it.

    Args:
        handles: Handles that registering the hooks returned. If registering one hook fails, the
            hooks before it are removed.

    Example:
        >>> from torch import nn, ones
        >>> layer, seen = nn.Linear(1, 1), []
        >>> with hooked([layer.register_forward_pre_hook(lambda *_: seen.append("inside"))]):
        ...     _ = layer(ones(1))
        >>> _ = layer(ones(1))
        >>> seen
        ['inside']
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
