"""Globs of dotted names."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(name: str, glob: str) -> bool:
    """Return whether a glob matches a dotted name, or the name of a module around it.

    Example:
        >>> matches("mid_block.attentions.0.to_q", "mid_block.*"), matches("conv_in", "mid_block")
        (True, False)
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), glob) for end in range(1, len(parts) + 1))
