"""What the process does with memory that is freed: keep it for speed, or give it back."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_memory() -> None:
    """Ask glibc to keep freed memory instead of handing it back between layers.

    Feature maps are allocated and freed at every layer; by default glibc returns them to the
    system and pays for page faults at the next. Does nothing where the allocator is not glibc's.
    """
    if _has_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def release_memory() -> None:
    """Ask glibc to hand freed memory back to the system, wherever it lies.

    Aligned blocks of one size, as tensors are, do not fit where others like them were (before glibc
    2.38), so that a loop over layers which holds none of them grows all the same. Does nothing
    where the allocator is not glibc's.
    """
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
