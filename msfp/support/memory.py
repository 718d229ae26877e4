"""Memory of this process and of the machine, and free space on disks."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

STATUS, CLEAR, MACHINE = (
    Path("/proc/self/status"),
    Path("/proc/self/clear_refs"),
    Path("/proc/meminfo"),
)
"""Linux files that give a process's memory, reset its peak, and give the machine's memory."""
LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The memory that a container may use, where it is limited."""


def forget_peak() -> None:
    """Reset the peak memory of this process, if the system supports it."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak_bytes() -> int | None:
    """Return the peak memory of this process in bytes since the last reset, None if unknown.

    Example:
        >>> forget_peak()
        >>> peak = peak_bytes()
        >>> peak is None or peak > 1e6
        True
    """
    return _kilobytes(STATUS, "VmHWM") if CLEAR.exists() else None


def resident_bytes() -> int | None:
    """Return the memory of this process in bytes, None if unknown."""
    return _kilobytes(STATUS, "VmRSS")


def available_bytes() -> int | None:
    """Return the memory in bytes that this process can still get, swap included, None if unknown.

    Pages of files, which the system takes back when it needs them, do not count as taken.
    """
    free = _kilobytes(MACHINE, "MemAvailable")
    if free is None:
        return None
    free += _kilobytes(MACHINE, "SwapFree") or 0
    limit = _text(LIMIT).strip()
    taken = _kilobytes(STATUS, "RssAnon") or 0
    return min(free, max(0, int(limit) - taken)) if limit.isdigit() else free


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet.

    Example:
        >>> free_disk(Path("not/yet")) > 0
        True
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _kilobytes(file: Path, name: str) -> int | None:
    """Return a number in a Linux file, in bytes."""
    found = re.search(rf"{name}:\s*(\d+) kB", _text(file))
    return 1024 * int(found[1]) if found else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
