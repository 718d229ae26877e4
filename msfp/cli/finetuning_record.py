"""The record of an unfinished fine-tuning run, in one folder, from which the run resumes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from msfp.errors import InputError
from msfp.reports.finetuning_page import Row
from msfp.support.container import FileKind, check_fingerprint, read, write
from msfp.support.fingerprints import difference
from msfp.training.config import FinetuneConfig, options_of_version_1

FILE = "run.safetensors"
KIND = FileKind("a record of fine-tuning", migrations={1: lambda header: header})
FIRST_FILE = "run.json"
"""The file that version 1, of msfp 0.2.0, wrote instead of `FILE`."""


class FinetuningRecord:
    """The rows of finished trainings, and the state and time of the unfinished one.

    Args:
        folder: Folder of the record.
        settings: All that the result depends on, by option, as plain JSON types.
        writes: Whether this process writes the record.

    Attributes:
        seconds: Seconds that each training has taken so far, by its name.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "tuned.state"
        >>> record = FinetuningRecord(folder, {"--steps": 160})
        >>> record.begin()
        >>> record.spent("single LoRA", 12.5)
        >>> again = FinetuningRecord(folder, {"--steps": 160})
        >>> again.resume()
        >>> again.seconds
        {'single LoRA': 12.5}
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.seconds: dict[str, float] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._images: dict[str, torch.Tensor] = {}

    def resume(self) -> None:
        """Read the record, if there is one.

        Raises:
            InputError: If the record cannot be read, or was written with other settings.
        """
        file, first = self.folder / FILE, self.folder / FIRST_FILE
        if not file.exists() and first.exists():
            self._resume_first(first)
            return
        if not file.exists():  # the run was interrupted before it wrote a record
            return
        facts = check_fingerprint(file, KIND, self.settings).facts
        self._images = read(file, KIND)[1]
        self.seconds, self._rows = facts["seconds"], facts["rows"]

    def _resume_first(self, file: Path) -> None:
        """Read a record of version 1: a JSON file, and a file of images for each row."""
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            settings = settings_of_version_1(kept["facts"])
            self.seconds, self._rows = kept["seconds"], kept["rows"]
            for name in self._rows:
                images = self.folder / f"{_slug(name)}.images.safetensors"
                self._images[name] = load_file(images)["images"]
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read as {KIND.name}: {error}") from error
        unlike = difference(settings, self.settings)
        if unlike is not None:
            raise InputError(f"{file} belongs to another run: {unlike}")

    def begin(self) -> None:
        """Create the folder, and write a record with the settings of the run.

        Raises:
            InputError: If the folder cannot be created or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be made: {error.strerror}") from error
        self._write()

    def state(self, name: str) -> Path:
        """Return the state file of a training."""
        return self.folder / f"{_slug(name)}.safetensors"

    def spent(self, name: str, seconds: float) -> None:
        """Record how many seconds a training has taken."""
        self.seconds[name] = seconds
        self._write()

    def row(self, name: str) -> Row | None:
        """Return the row of a finished training, or None if the training has not finished."""
        if name not in self._rows:
            return None
        return Row(**self._rows[name], images=self._images[name])

    def ended(self, row: Row) -> None:
        """Record the row of a finished training, and remove its state."""
        self._rows[row.name], self._images[row.name] = row.to_dict(), row.images
        self._write()
        if self.writes:
            self.state(row.name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)

    def discard_if_empty(self) -> None:
        """Remove the folder if it holds nothing to resume from."""
        states = {file.name for file in self.folder.glob("*.safetensors")} - {FILE}
        if not states and not self._rows:
            self.discard()

    def _write(self) -> None:
        if self.writes:
            facts = {"seconds": self.seconds, "rows": self._rows}
            write(self.folder / FILE, KIND, self._images, facts, self.settings)


def _slug(name: str) -> str:
    """Return a name with all characters that are no letter or digit replaced by hyphens."""
    return re.sub(r"[^0-9A-Za-z]+", "-", name)


def option_settings(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings of a config that its result depends on, by command-line option.

    Example:
        >>> settings = option_settings(FinetuneConfig(hub=2))
        >>> settings["--hub"], settings["--rates-router"], "--shard" in settings
        (2, 0.001, False)
    """
    values = config.to_dict()
    rates = {f"rates_{group}": rate for group, rate in values.pop("rates").items()}
    # The result does not depend on shard, and the pipeline determines the guidance branches.
    for name in ("shard", "guidance_branches", "guidance_rows"):
        del values[name]
    return {f"--{name.replace('_', '-')}": value for name, value in (values | rates).items()}


def settings_of_version_1(facts: dict[str, Any]) -> dict[str, Any]:
    """Return settings that msfp 0.2.0 wrote, by the options of this version."""
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in facts.items()}
    known = {
        "denoising_power": given.pop("power"),
        "accumulation": given.pop("accumulate"),
        "rates": {group: float(rate) for group, _, rate in map(_parted, given.pop("rate"))},
        "temperature": _both_ends(given.pop("temperature")),
    }
    names = ("place", "initial", "student_every")
    known |= {name: given.pop(name) for name in names}
    options = options_of_version_1(known)
    own = set(FinetuneConfig().to_dict())
    options |= {name: given.pop(name) for name in list(given) if name in own}
    retired = {name: options.pop(name) for name in list(options) if name not in own}
    config = FinetuneConfig(**options)
    checkpoint = {"checkpoint": given.pop("checkpoint")}
    others = {f"--{name.replace('_', '-')}": value for name, value in (given | retired).items()}
    return option_settings(config) | others | checkpoint


def _both_ends(temperature: list[float]) -> list[float]:
    """Return the first and the last temperature of a list, which may have only one."""
    return [temperature[0], temperature[-1]]


def _parted(word: str) -> tuple[str, str, str]:
    return word.partition("=")
