"""Writing folders and files atomically: no other process sees an unfinished one."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msfp.errors import InputError


def check_output(path: Path) -> None:
    """Raise InputError unless a new folder or file can be made at a path.

    The path must not exist, or be an empty folder other than the working directory. Its nearest
    existing parent must be a folder that can be written to.
    """
    path = path.absolute()
    try:
        _check_new(path)
    except OSError as error:  # for example, the name is too long
        raise InputError(f"output {path} cannot be made: {error.strerror}") from error


def _check_new(path: Path) -> None:
    """Raise InputError or OSError unless a new folder or file can be made."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"output {path} exists: name a new one")
    if path.is_dir() and (any(path.iterdir()) or path == Path.cwd()):
        raise InputError(
            f"output folder {path} exists and is not empty or is the working directory: "
            "name a new one"
        )
    parent = next(parent for parent in path.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output {path} cannot be made: {parent} is not a folder to write in")
    # Permissions are not enough: a file system may still refuse, or the name may be too long with
    # the prefix and suffix of the temporary folder.
    Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=parent)).rmdir()


def existing_folder(path: Path) -> Path:
    """Return the nearest folder above a path that exists.

    Example:
        >>> existing_folder(Path("not/yet")) == Path.cwd()
        True
    """
    return next(each for each in path.absolute().parents if each.is_dir())


def check_folder(argument: str, path: Path) -> None:
    """Raise InputError unless a folder that may exist can be written to, or made.

    Args:
        argument: Name of the path in error messages.
        path: The folder, existing or new.
    """
    path = path.absolute()
    try:
        there = next(each for each in (path, *path.parents) if each.exists())
        Path(tempfile.mkdtemp(prefix=".", dir=there)).rmdir()
    except OSError as error:
        raise InputError(
            f"{argument} {path} must be a folder to write in: {error.strerror}"
        ) from error


def usual_mode(folder: Path) -> int:
    """Return the default permissions of new files, by creating a file in a writable folder.

    Temporary folders and the files of safetensors have other permissions: only their owner can read
    them.
    """
    probe = folder / ".permissions"
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `folder` if the block ends without an error."""
    check_output(folder)
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    except OSError as error:
        raise InputError(f"output {folder} cannot be made: {error.strerror}") from error
    try:
        yield partial
        mode = usual_mode(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        partial.chmod(mode | (mode & 0o444) >> 2)  # whoever may read the folder may also enter it
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_file(argument: str, path: Path, suffix: str) -> None:
    """Raise InputError unless a new file with a suffix can be made in a folder that exists.

    Args:
        argument: Name of the path in error messages.
        path: The new file.
        suffix: Required suffix of its name, such as ".png".
    """
    path = path.absolute()
    if path.suffix != suffix or path.exists() or not os.access(path.parent, os.W_OK):
        raise InputError(
            f"{argument} {path} must be a new {suffix} file in a folder that exists and can be "
            "written to"
        )


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that renames in it survive a crash, where possible."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, renamed to `path` if the block ends without an error."""
    path = path.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        partial.chmod(usual_mode(partial.parent))
        partial.replace(path)
