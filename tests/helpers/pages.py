"""The scripts of the documentation, as modules."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def script(name):
    """Return a script of the docs as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
