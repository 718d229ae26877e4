"""Settings of the process that make sampling on a CPU faster."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_memory() -> None:
    """Ask glibc to keep freed memory instead of handing it back between layers.

    Feature maps are allocated and freed at every layer; by default glibc returns them to the
    system and pays for page faults at the next. Does nothing where the allocator is not glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
