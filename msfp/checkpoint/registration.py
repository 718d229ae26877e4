"""Making `quant_method: "msfp"` known to diffusers, without importing it.

diffusers looks classes up in two tables, and transformers in a third. Each gets an entry that is
resolved when it is looked up: at once where its module is imported already, else as soon as it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import wrapt

METHOD = "msfp"
CONFIG = ("msfp.checkpoint.diffusers_config", "MSFPConfig")
QUANTIZER = ("msfp.checkpoint.diffusers_quantizer", "MSFPQuantizer")
TABLES = {
    "diffusers.quantizers.auto": {
        "AUTO_QUANTIZER_MAPPING": QUANTIZER,
        "AUTO_QUANTIZATION_CONFIG_MAPPING": CONFIG,
    },
    # Without it `PipelineQuantizationConfig(quant_backend="msfp")` is refused; models of
    # transformers are not quantized.
    "transformers.quantizers.auto": {"AUTO_QUANTIZATION_CONFIG_MAPPING": CONFIG},
}
"""The classes that are looked up, by the module and the name of the table."""


class LateTable(dict[str, Any]):
    """A table one entry of which is imported when it is looked up.

    Args:
        table: The other entries.
        place: Module and name of the class that "msfp" stands for.
    """

    def __init__(self, table: dict[str, Any], place: tuple[str, str]) -> None:
        super().__init__(table)
        self._place = place
        super().__setitem__(METHOD, None)

    def __getitem__(self, key: str) -> Any:
        if key == METHOD and super().__getitem__(key) is None:
            module, name = self._place
            self[key] = getattr(importlib.import_module(module), name)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry, or the default."""
        return self[key] if key in self else default  # noqa: SIM401

    def values(self) -> Any:
        """Return all entries."""
        return [self[key] for key in self]

    def items(self) -> Any:
        """Return all keys and entries."""
        return [(key, self[key]) for key in self]

    def __iter__(self) -> Iterator[str]:
        # Without a method of its own, dict() would copy entries past __getitem__.
        return super().__iter__()


def register() -> None:
    """Make msfp known to diffusers and transformers, now or when they are imported."""
    for module in TABLES:
        wrapt.register_post_import_hook(_extend, module)


def _extend(module: ModuleType) -> None:
    """Put the entries into the tables of a module."""
    for name, place in TABLES[module.__name__].items():
        table = getattr(module, name)
        if METHOD not in table:
            setattr(module, name, LateTable(table, place))
