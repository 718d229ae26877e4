"""The environment of a row: versions, code and processor."""

from __future__ import annotations

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

PROCESSORS = Path("/proc/cpuinfo")
"""The Linux file that names the processor."""


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


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
