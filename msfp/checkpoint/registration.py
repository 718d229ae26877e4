"""Registering `quant_method: "msfp"` with diffusers, without importing diffusers.

diffusers looks up classes in two tables, and transformers in a third. Each table gets an entry for
msfp, whose class is imported when the entry is looked up. The entry is added at once if the module
of the table is already imported, otherwise when that module is imported.
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
REFUSAL = ("msfp.checkpoint.diffusers_quantizer", "refuse_transformers")
TABLES = {
    "diffusers.quantizers.auto": {
        "AUTO_QUANTIZER_MAPPING": QUANTIZER,
        "AUTO_QUANTIZATION_CONFIG_MAPPING": CONFIG,
    },
    # `PipelineQuantizationConfig(quant_backend="msfp")` needs the config. Models of transformers
    # are not quantized.
    "transformers.quantizers.auto": {
        "AUTO_QUANTIZER_MAPPING": REFUSAL,
        "AUTO_QUANTIZATION_CONFIG_MAPPING": CONFIG,
    },
}
"""The classes of the entries, by the module and the name of the table."""


class LateTable(dict[str, Any]):
    """A table with one entry that is imported when it is looked up.

    Args:
        table: The other entries.
        place: Module and name of the class under the key "msfp".
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
        # Without this method, dict() would copy entries without calling __getitem__.
        return super().__iter__()


def register() -> None:
    """Register msfp with diffusers and transformers, now or when they are imported."""
    for module in TABLES:
        wrapt.register_post_import_hook(_extend, module)


def _extend(module: ModuleType) -> None:
    """Add the entries to the tables of a module."""
    for name, place in TABLES[module.__name__].items():
        table = getattr(module, name)
        if METHOD not in table:
            setattr(module, name, LateTable(table, place))
