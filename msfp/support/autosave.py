"""What was measured so far, in a file that is written from time to time and gone on from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from msfp.support.files import check_folder, check_new_file
from msfp.support.run_files import described, description_of, save_run, saved_tensors

SAVE_SECONDS, SAVE_SHARE = 60, 0.05
"""Least time between states that are saved, and the largest share of time that goes into saving."""


class Measures(Protocol):
    """What adds up over images that come in batches."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that `restore` needs to go on with the images after these."""

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `tensors` gave."""


def check_state(path: Path, kind: str) -> None:
    """Raise InputError unless a path is that of a state, or of a new file that can be written.

    Args:
        path: Where the state is or is to be.
        kind: What it must be, as "a state of msfp evaluate".
    """
    if not path.exists():
        check_new_file("state", path, ".safetensors")
        return
    description_of(path, kind)
    check_folder("state", path.absolute().parent)


class TimedState:
    """What was measured in a run, in a file.

    Args:
        path: A safetensors file, which may exist.
        kind: What it must be.
        run: What makes a run another one, as plain JSON types.

    Raises:
        InputError: If the file is something else, or cannot be written.
    """

    def __init__(self, path: Path, kind: str, run: dict[str, Any]) -> None:
        check_state(path, kind)
        self._path, self._kind, self._run = path, kind, run
        self._next = time.monotonic() + SAVE_SECONDS

    def restore(self, measures: Measures) -> None:
        """Take what was measured from the file, if there is one.

        Raises:
            InputError: If it is of another run.
        """
        if self._path.exists():
            described(self._path, self._kind, self._run)
            measures.restore(saved_tensors(self._path))

    def save(self, measures: Measures) -> None:
        """Write what was measured, unless that was done not long ago."""
        started = time.monotonic()
        if started < self._next:
            return
        save_run(self._path, self._kind, measures.tensors(), {"run": self._run})
        now = time.monotonic()
        self._next = now + max(SAVE_SECONDS, (now - started) / SAVE_SHARE)
