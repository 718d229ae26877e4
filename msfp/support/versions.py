"""Software versions and machine, for reports."""

from __future__ import annotations

import platform

import diffusers
import torch

from msfp.version import __version__


def versions() -> dict[str, str]:
    """Return the versions of msfp, torch, diffusers and Python, and the machine type."""
    return {
        "msfp": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
