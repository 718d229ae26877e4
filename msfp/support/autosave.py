"""Saving what was measured so far from time to time, so that a long run can resume."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from msfp.support.container import Header, Kind, check_fingerprint, header_of, read, write
from msfp.support.files import check_folder, check_new_file

SAVE_SECONDS, SAVE_SHARE = 60, 0.05
"""Least time between states that are saved, and the largest share of time that goes into saving."""


class Measures(Protocol):
    """What adds up over images that come in batches."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that `restore` needs to resume with the images after these."""

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `tensors` gave."""


def check_state(path: Path, kind: Kind) -> None:
    """Raise InputError unless a path is that of a state, or of a new file that can be written.

    Args:
        path: Where the state is or is to be.
        kind: What it must be.
    """
    if not path.exists():
        check_new_file("state", path, ".safetensors")
        return
    header_of(path, kind)
    check_folder("state", path.absolute().parent)


class Autosave:
    """What was measured in a run, in a file.

    Args:
        path: A safetensors file, which may exist.
        kind: What it must be.
        fingerprint: What must be equal for a run to resume from the file, as plain JSON types.

    Raises:
        InputError: If the file is something else, or cannot be written.
    """

    def __init__(self, path: Path, kind: Kind, fingerprint: dict[str, Any]) -> None:
        check_state(path, kind)
        self._path, self._kind, self._fingerprint = path, kind, fingerprint
        self._next = time.monotonic() + SAVE_SECONDS

    def restore(self, measures: Measures) -> None:
        """Take what was measured from the file, if there is one.

        Raises:
            InputError: If it is of another run.
        """
        if self._path.exists():
            check_fingerprint(self._path, self._kind, self._fingerprint)
            measures.restore(read(self._path, self._kind)[1])

    def save(self, measures: Measures) -> None:
        """Write what was measured, unless that was done not long ago."""
        started = time.monotonic()
        if started < self._next:
            return
        write(self._path, self._kind, measures.tensors(), {}, self._fingerprint)
        now = time.monotonic()
        self._next = now + max(SAVE_SECONDS, (now - started) / SAVE_SHARE)


def run_as_fingerprint(header: Header) -> Header:
    """Return the header of a state of version 1, which had its fingerprint among the facts."""
    facts = dict(header.facts)
    return Header(facts.pop("run"), facts)
