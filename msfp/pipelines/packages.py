"""Packages that the components of a pipeline need, named before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from msfp.errors import InputError

INDEX = "model_index.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""Names of models on the hub: owner/name."""
WEIGHTS = re.compile(
    r"[^.]+(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
"""Names of files with weights, such as `model.fp16-00001-of-00002.safetensors`."""


def check_packages(folder: Path) -> None:
    """Raise InputError if a package that a pipeline folder needs is not installed.

    Args:
        folder: A folder with a `model_index.json`.
    """
    for component, package in needed_packages(folder).items():
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"{folder} needs the package {package} for its {component}: "
                f"pip install {package.replace('_', '-')}"
            )


def needed_packages(folder: Path) -> dict[str, str]:
    """Return the package of each component of a pipeline folder, without those of diffusers.

    Components of a pipeline's own module in diffusers, such as a safety checker, count as those of
    transformers, on which they are built.

    Raises:
        InputError: If the index is not JSON of the expected form.
    """
    packages = {}
    for name, library in libraries(folder).items():
        if library not in ("diffusers", "msfp"):
            package = library.split(".")[0]
            packages[name] = "transformers" if is_of_diffusers(library) else package
    return packages


def libraries(folder: Path) -> dict[str, str]:
    """Return the library of each component of a pipeline folder, without components that are None.

    Raises:
        InputError: If the index is not JSON of the expected form.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        parts = {name: part[0] for name, part in index.items() if isinstance(part, list)}
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{folder / INDEX} cannot be read: {error}") from error
    return {name: str(library) for name, library in parts.items() if library is not None}


def variant_of(folder: Path) -> str | None:
    """Return the variant in which some component of a pipeline folder has its only weights.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "unet").mkdir()
        >>> (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
        >>> variant_of(folder)
        'fp16'
    """
    variants: dict[Path, set[str | None]] = {}
    for file in folder.glob("*/*"):
        found = WEIGHTS.fullmatch(file.name)
        if found is not None:
            variants.setdefault(file.parent, set()).add(found["variant"])
    needed = [min(map(str, each)) for each in variants.values() if None not in each]
    return min(needed, default=None)


def is_of_diffusers(library: str) -> bool:
    """Return whether a library of an index is diffusers, or a pipeline's own module in it.

    Example:
        >>> is_of_diffusers("diffusers"), is_of_diffusers("stable_diffusion"), is_of_diffusers("os")
        (True, True, False)
    """
    package = library.split(".")[0]
    return (
        package == "diffusers"
        or importlib.util.find_spec(f"diffusers.pipelines.{package}") is not None
    )
