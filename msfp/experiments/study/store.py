"""Results of the study as JSON lines, one for each row; they survive a killed run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from msfp.checkpoint.migrations import request_of_version_1
from msfp.training.config import options_of_version_1

VERSION = 2
"""Version of the records that are written. Records of version 1, of msfp 0.2.0, have no version."""
Record = dict[str, Any]
"""The record of a row: `version`, `name`, `row`, how it was run and its measurements."""


class Store:
    """The records of a folder's `results.jsonl`.

    An incomplete line of a killed run is ignored. Of several lines with one name, the last counts.
    Several processes may append to one file: each record is a single write at the end of the file.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "results.jsonl"

    def records(self) -> dict[str, Record]:
        """Return the records by the names of their rows."""
        lines = self.file.read_text().split("\n") if self.file.exists() else []
        records = [record for record in map(_parsed, lines) if record is not None]
        return {record["name"]: record for record in records}

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab+", buffering=0) as stream:
            if stream.tell():  # an incomplete last line must not spoil this one
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else b"\n" + line
            stream.write(line)
            os.fsync(stream.fileno())


def _parsed(line: str) -> Record | None:
    """Return the record of a line, None if the line is incomplete."""
    try:
        record: Record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if "version" in record else _of_version_1(record)


def _of_version_1(record: Record) -> Record:
    """Return a record of version 1 with the present names of its settings."""
    request, options = record["quantization"], record["finetune"]
    return record | {
        "version": VERSION,
        "quantization": None if request is None else request_of_version_1(request),
        "finetune": None if options is None else options_of_version_1(options),
    }
