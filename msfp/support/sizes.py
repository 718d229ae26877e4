"""Sizes of files as people write them."""

from __future__ import annotations

import re
from typing import Any

from msfp.errors import InputError

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
WRITTEN = re.compile(rf"(\d+\.?\d*|\.\d+) ?({'|'.join(UNITS)})")


def parse_size(name: str, text: Any) -> float:
    """Return the bytes of a written size.

    Args:
        name: Name of the argument, for the error.
        text: A number and a unit of `UNITS`, which are powers of 1000.

    Raises:
        InputError: If it is something else, or 0.

    Example:
        >>> parse_size("budget", "1.5 GB"), parse_size("budget", "700MB")
        (1500000000.0, 700000000.0)
    """
    found = WRITTEN.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise InputError(f"{name} must be a size such as '500MB' or '1.5GB', not {text!r}")
    size = float(found[1]) * UNITS[found[2]]
    if not size:
        raise InputError(f"{name} must be larger than 0, not {text!r}")
    return size
