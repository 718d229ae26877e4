"""The tensors that the functions of a waiting thread have in their variables."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator

import torch

from msfp.support.trees import tensors_in


def tensors_of(thread: threading.Thread) -> Iterator[torch.Tensor]:
    """Yield the tensors in local variables of the functions that a thread runs, also in lists.

    Args:
        thread: A thread that waits.

    Example:
        >>> def work(x, ready, end):
        ...     ready.set(), end.wait()
        >>> ready, end = threading.Event(), threading.Event()
        >>> thread = threading.Thread(target=work, args=(torch.ones(3), ready, end))
        >>> thread.start(), ready.wait()
        (None, True)
        >>> len(list(tensors_of(thread))) > 0
        True
        >>> end.set()
    """
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        values = frame.f_locals
        yield from tensors_in(dict(values))
        if isinstance(values, dict) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            values.clear()  # before Python 3.13 a copy, which would keep the tensors
        frame = frame.f_back
