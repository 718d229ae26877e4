"""Hooks of modules that are removed when a block ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol


class Handle(Protocol):
    """What `torch.nn.Module.register_forward_hook` and its kin return."""

    def remove(self) -> None:
        """Take the hook away."""


@contextmanager
def hooked(handles: Iterable[Handle]) -> Iterator[None]:
    """Keep hooks inside the block, and remove them after it.

    Args:
        handles: What registering the hooks returned. Where registering one of them fails, those
            before it are removed.

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
