"""The environment of a row: versions, code, processor, and peak memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

import torch

import fpformats
from msfp.support.versions import versions

STATUS, CLEAR, PROCESSORS = (
    Path("/proc/self/status"),
    Path("/proc/self/clear_refs"),
    Path("/proc/cpuinfo"),
)
"""Linux files that give a process's peak memory, reset it, and name the processor."""


def machine() -> dict[str, str]:
    """Return the versions, the machine, the code and the date."""
    return versions() | {
        "threads": str(torch.get_num_threads()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "code": code(),
        "date": datetime.now(UTC).date().isoformat(),
    }


@functools.cache
def processor() -> str:
    """Return the name of the processor."""
    named = re.search(r"model name\s*: (.*)", _text(PROCESSORS))
    return named[1] if named else platform.processor() or platform.machine()


@functools.cache
def code() -> str:
    """Return a short hash of all Python files of both packages, which identifies their version."""
    digest = hashlib.sha256()
    for folder in (*map(Path, fpformats.__path__), Path(__file__).parents[2]):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


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
    peak = re.search(r"VmHWM:\s*(\d+) kB", _text(STATUS)) if CLEAR.exists() else None
    return 1024 * int(peak[1]) if peak else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
