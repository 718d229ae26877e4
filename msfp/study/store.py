"""Results of the study as JSON lines, one row each, which survive a run that is killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""What is known of a row: `name`, `row`, how it was run and what was measured."""


class Store:
    """The records of a folder's `results.jsonl`.

    A line that was cut short by a kill is dropped. Of several lines of one name the last counts.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "results.jsonl"

    def records(self) -> dict[str, Record]:
        """Return the records by the names of their rows."""
        return {record["name"]: record for record in map(json.loads, self._whole_lines())}

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns."""
        lines = self._whole_lines()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as stream:
            stream.truncate(sum(len(line) + 1 for line in lines))
            stream.write(json.dumps(record, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _whole_lines(self) -> list[str]:
        """Return the lines that end; json.dumps writes ASCII, so characters are bytes."""
        return self.file.read_text().split("\n")[:-1] if self.file.exists() else []
