"""What a report was made with."""

from __future__ import annotations

import platform

import diffusers
import torch

from msfp.version import __version__


def versions() -> dict[str, str]:
    """Return the versions of what was run, and on what kind of machine."""
    return {
        "msfp": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
