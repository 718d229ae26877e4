"""What is kept of fine-tuning that has not ended, in one folder, so that it can go on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from msfp.errors import InputError
from msfp.reports.finetuning_page import Row
from msfp.support.files import atomic_file

FILE = "run.json"


class TuningRecord:
    """The rows of trainings that ended, and the state and time of the one that did not.

    Args:
        folder: Where it is kept.
        facts: The settings that give the result, by option, as plain JSON types.
        writes: Whether this process is the one that writes.

    Attributes:
        seconds: What each training has taken so far, by its name.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "tuned.state"
        >>> record = TuningRecord(folder, {"--steps": 160})
        >>> record.begin()
        >>> record.spent("single LoRA", 12.5)
        >>> again = TuningRecord(folder, {"--steps": 160})
        >>> again.resume()
        >>> again.seconds
        {'single LoRA': 12.5}
    """

    def __init__(self, folder: Path, facts: dict[str, Any], *, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.facts: dict[str, Any] = json.loads(json.dumps(facts))
        self.seconds: dict[str, float] = {}
        self._rows: dict[str, dict[str, Any]] = {}

    def resume(self) -> None:
        """Read what was kept.

        Raises:
            InputError: If it cannot be read, or is of other settings.
        """
        file = self.folder / FILE
        if not file.exists():  # nothing was kept before the end came
            return
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            facts, self.seconds, self._rows = kept["facts"], kept["seconds"], kept["rows"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{file} is not of fine-tuning: {error}") from error
        for key in sorted(facts.keys() | self.facts.keys()):
            if facts.get(key) != self.facts.get(key):
                raise InputError(
                    f"{self.folder} is of a run with other settings: its {key} is "
                    f"{facts.get(key)}, not {self.facts.get(key)}"
                )

    def begin(self) -> None:
        """Make the folder, and write down what the run is.

        Raises:
            InputError: If that cannot be done.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise InputError(f"{self.folder} cannot be made: {error.strerror}") from error

    def state(self, name: str) -> Path:
        """Return the file of the state of a training."""
        return self._file(name, "safetensors")

    def spent(self, name: str, seconds: float) -> None:
        """Write down how long a training has taken."""
        self.seconds[name] = seconds
        self._write()

    def row(self, name: str) -> Row | None:
        """Return what was measured after a training, or None where it did not end."""
        if name not in self._rows:
            return None
        file = self._file(name, "images.safetensors")
        try:
            return Row(**self._rows[name], images=load_file(file)["images"])
        except (OSError, SafetensorError, LookupError, TypeError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error

    def ended(self, row: Row) -> None:
        """Keep what was measured after a training, in place of its state."""
        self._rows[row.name] = row.to_dict()
        if not self.writes:
            return
        images = {"images": row.images.contiguous()}
        with atomic_file(self._file(row.name, "images.safetensors")) as partial:
            save_file(images, partial)
        self._write()
        self.state(row.name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)

    def discard_if_empty(self) -> None:
        """Remove the folder if nothing can go on from it."""
        if not any(self.folder.glob("*.safetensors")):
            self.discard()

    def _file(self, name: str, suffix: str) -> Path:
        return self.folder / f"{re.sub(r'[^0-9A-Za-z]+', '-', name)}.{suffix}"

    def _write(self) -> None:
        if not self.writes:
            return
        kept = {"facts": self.facts, "seconds": self.seconds, "rows": self._rows}
        with atomic_file(self.folder / FILE) as partial:
            partial.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
