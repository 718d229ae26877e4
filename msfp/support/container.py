"""The file format of msfp: safetensors with a description in the metadata.

The metadata have one entry, `msfp`, which is JSON:

    kind         kind of the file, such as "a calibration"
    version      version of the layout; migrations read files of earlier versions
    fingerprint  facts that must be equal for a run to resume from the file; {} in other files
    facts        all other contents that are not tensors

Diffusers writes the files of checkpoints, which have the same entry.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msfp.errors import InputError
from msfp.support.files import sync_folder, usual_mode
from msfp.support.fingerprints import difference

KEY = "msfp"


class Header(NamedTuple):
    """The metadata of a file.

    Attributes:
        fingerprint: Facts that must be equal for a run to resume from the file.
        facts: All other contents that are not tensors.
    """

    fingerprint: dict[str, Any]
    facts: dict[str, Any]


Migration = Callable[[Header], Header]
"""Converts the header of one version to that of the next."""
Named = dict[str, torch.Tensor]
TensorMigration = Callable[[Named], Named]
"""Converts the tensors of one version to those of the next."""


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: Name of the kind with an article, such as "a calibration".
        version: Current version, in which files are written.
        first_key: Name of the metadata entry that version 1, of msfp 0.2.0, had instead of `msfp`.
            Its JSON is the facts of version 1.
        migrations: Conversion of the header to the next version, for every version but the current.
        tensor_migrations: Conversion of the tensors to the next version, for those versions after
            which tensors were renamed.
    """

    name: str
    version: int = 2
    first_key: str | None = None
    migrations: Mapping[int, Migration] = field(default_factory=dict)
    tensor_migrations: Mapping[int, TensorMigration] = field(default_factory=dict)


def write(
    file: Path,
    kind: FileKind,
    tensors: Mapping[str, torch.Tensor],
    facts: dict[str, Any],
    fingerprint: dict[str, Any] | None = None,
) -> None:
    """Write a file atomically: a killed process leaves either the old file or the new one.

    Args:
        file: A .safetensors file, existing or new.
        kind: FileKind of the file.
        tensors: Tensors by name.
        facts: All other contents, as plain JSON types.
        fingerprint: Facts that must be equal for a run to resume from the file, as plain JSON
            types. None if no run resumes from it.

    Raises:
        InputError: If the file cannot be written.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # The folder has the same name in each write. The next write therefore removes the leftovers of
    # a killed process, including safetensors' temporary files.
    folder = file.with_name(f".{file.name}.partial")
    partial = folder / file.name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file(whole, partial, metadata=metadata(kind, Header(fingerprint or {}, facts)))
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.chmod(usual_mode(folder))
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync_folder(file.parent)


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, which is written with them in any order.

    Files of the same tensors and metadata have the same bytes then.
    """
    with file.open("rb+") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            opened.seek(8)
            opened.write(text.ljust(size))


def metadata(kind: FileKind, header: Header) -> dict[str, str]:
    """Return the metadata of a safetensors file of a kind."""
    description = {"kind": kind.name, "version": kind.version, **header._asdict()}
    return {KEY: json.dumps(description)}


def header_of(file: Path, kind: FileKind) -> Header:
    """Return the header of a file, converted to the current version.

    Raises:
        InputError: If the file cannot be read, or is of another kind or a later version.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return header_in(str(file), opened.metadata() or {}, kind)[1]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as {kind.name}: {error}") from error


def read(file: Path, kind: FileKind, device: str | torch.device = "cpu") -> tuple[Header, Named]:
    """Return the header of a file and its tensors by name, converted to the current version.

    Args:
        file: A .safetensors file.
        kind: Required kind of the file.
        device: Device of the tensors.

    Raises:
        InputError: As `header_of` does.
    """
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            version, header = header_in(str(file), opened.metadata() or {}, kind)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as {kind.name}: {error}") from error
    for start in range(version, kind.version):
        if start in kind.tensor_migrations:
            tensors = kind.tensor_migrations[start](tensors)
    return header, tensors


def header_in(file: str, told: Mapping[str, str], kind: FileKind) -> tuple[int, Header]:
    """Return the version in a safetensors file's metadata, and the header in the current version.

    Args:
        file: Name of the file in error messages.
        told: Metadata of the file.
        kind: Required kind of the file.

    Raises:
        InputError: If the file is of another kind or a later version, or its metadata are damaged.
    """
    try:
        version, header = _told(file, told, kind)
        check_version(file, version, kind)
        if not all(isinstance(table, dict) for table in header):
            raise TypeError("the fingerprint and the facts must be tables")
        return version, migrated(header, version, kind)
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} cannot be read as {kind.name}: {error}") from error


def _told(file: str, told: Mapping[str, str], kind: FileKind) -> tuple[int, Header]:
    """Return the version and the header in a file's metadata, without migration."""
    if KEY in told:
        description = json.loads(told[KEY])
        if description["kind"] != kind.name:
            raise InputError(f"{file} must be {kind.name}, not {description['kind']}")
        return description["version"], Header(description["fingerprint"], description["facts"])
    if kind.first_key is not None and kind.first_key in told:
        return 1, Header({}, json.loads(told[kind.first_key]))
    raise InputError(f"{file} must be {kind.name}, but its metadata have no such entry")


def check_version(file: str, version: Any, kind: FileKind) -> None:
    """Raise InputError unless files of a version can be read."""
    if version not in range(1, kind.version + 1):
        raise InputError(
            f"{file} is {kind.name} of version {version}; this msfp reads versions up to "
            f"{kind.version}"
        )


def migrated(header: Header, version: int, kind: FileKind) -> Header:
    """Return a header of some version converted to the current version."""
    for start in range(version, kind.version):
        header = kind.migrations[start](header)
    return header


def check_fingerprint(file: Path, kind: FileKind, fingerprint: dict[str, Any]) -> Header:
    """Return the header of a file; raise InputError unless a run can resume from the file.

    Raises:
        InputError: If the file is of another kind, or from a run with another fingerprint.
    """
    header = header_of(file, kind)
    unlike = difference(header.fingerprint, fingerprint)
    if unlike is not None:
        raise InputError(f"{file} is {kind.name} of another run: {unlike}")
    return header


def part(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a part, those named `part/...`, without this prefix.

    Example:
        >>> part("a", {"a/b": torch.zeros(1), "c/b": torch.ones(1)})
        {'b': tensor([0.])}
    """
    start = f"{name}/"
    return {key[len(start) :]: each for key, each in tensors.items() if key.startswith(start)}
