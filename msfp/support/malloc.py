"""Freed memory: keep it in the process for speed, or return it to the system."""

from __future__ import annotations

import ctypes
import functools
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_memory() -> None:
    """Tell glibc to keep freed memory in the process instead of returning it to the system.

    Feature maps are allocated and freed at every layer. By default glibc returns their memory to
    the system, and the next layer pays for page faults. With another allocator, this does nothing.
    """
    if _has_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def release_memory() -> None:
    """Tell glibc to return all freed memory to the system, wherever it is in the heap.

    Before glibc 2.38, an aligned block, such as a tensor, does not fit into the space of a freed
    block of the same size. The memory of a loop over layers therefore grows even if the loop keeps
    no tensor. With another allocator, this does nothing.
    """
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
