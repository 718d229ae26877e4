"""Packages that the components of a pipeline need, named before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from msfp.errors import InputError

INDEX = "model_index.json"


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
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        parts = {name: part[0] for name, part in index.items() if isinstance(part, list)}
    except (ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{folder / INDEX} cannot be read: {error}") from error
    packages = {}
    for name, library in parts.items():
        if library is None or library in ("diffusers", "msfp"):
            continue
        package = str(library).split(".")[0]
        own = importlib.util.find_spec(f"diffusers.pipelines.{package}") is not None
        packages[name] = "transformers" if own else package
    return packages
