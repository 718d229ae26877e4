"""Saving the measurements of a long run periodically, so that the run can resume."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from msfp.support.container import FileKind, Header, check_fingerprint, header_of, read, write
from msfp.support.files import check_folder, check_new_file

SAVE_SECONDS, SAVE_SHARE = 60, 0.05
"""Shortest time between two saves, and the largest share of the run time spent on saving."""


class Measures(Protocol):
    """Measurements that accumulate over batches of images."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything that `restore` needs to resume after the last image measured."""

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the measurements by those that `tensors` returned."""


def check_state(path: Path, kind: FileKind) -> None:
    """Raise InputError unless a path is a saved state, or a new file can be written there.

    Args:
        path: File of the state, existing or new.
        kind: Required kind of the file.
    """
    if not path.exists():
        check_new_file("state", path, ".safetensors")
        return
    header_of(path, kind)
    check_folder("state", path.absolute().parent)


class Autosave:
    """A file with the measurements of a run, saved periodically.

    Args:
        path: A safetensors file, existing or new.
        kind: Required kind of the file.
        fingerprint: Facts that must be equal for a run to resume from the file, as plain JSON
            types.

    Raises:
        InputError: If the file is of another kind, or cannot be written.
    """

    def __init__(self, path: Path, kind: FileKind, fingerprint: dict[str, Any]) -> None:
        check_state(path, kind)
        self._path, self._kind, self._fingerprint = path, kind, fingerprint
        self._next = time.monotonic() + SAVE_SECONDS

    def restore(self, measures: Measures) -> None:
        """Restore the measurements from the file, if it exists.

        Raises:
            InputError: If the file is from a run with another fingerprint.
        """
        if self._path.exists():
            check_fingerprint(self._path, self._kind, self._fingerprint)
            measures.restore(read(self._path, self._kind)[1])

    def save(self, measures: Measures) -> None:
        """Save the measurements, unless the last save was too recent."""
        started = time.monotonic()
        if started < self._next:
            return
        write(self._path, self._kind, measures.tensors(), {}, self._fingerprint)
        now = time.monotonic()
        self._next = now + max(SAVE_SECONDS, (now - started) / SAVE_SHARE)


def run_as_fingerprint(header: Header) -> Header:
    """Return a header of version 1 in version 2: version 1 had its fingerprint in the facts."""
    facts = dict(header.facts)
    return Header(facts.pop("run"), facts)
