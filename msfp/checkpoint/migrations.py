"""Converting the quantization configs of earlier versions to the current version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msfp.support.container import Header

REQUEST_OF_1 = {
    "weights": "weight_bits",
    "activations": "activation_bits",
    "first_last": "end_bits",
    "first": "first_layers",
    "last": "last_layers",
    "attention": "attention_bits",
}
"""Names of version 1, of msfp 0.2.0, and their current names."""
REFINEMENT_BEFORE = {"branch_bits": 16, "branch_metric": "weight", "rotate_inputs": False}
"""What a refinement did where its file does not have these settings, which came later."""
DEFAULTS_OF_1 = {"sweeps": 0, "scales": "weight"}
"""Refinement settings that only version 1 had, with their defaults."""


def config_of_version_1(header: Header) -> Header:
    """Convert a quantization config of version 1 to the current version."""
    config = request_of_version_1(header.facts)
    if "entries" in config:
        config["adapters"] = config.pop("entries")
    if isinstance(layers := config.get("layers"), Mapping):
        config["layers"] = {
            name: renamed(formats, {"branch_entries": "branch_adapters"})
            for name, formats in layers.items()
        }
    return Header({}, config)


def request_of_version_1(request: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the fields of version 1 to the fields of `QuantizationConfig`.

    Refinement settings that no longer exist are put under the key `retired`.
    """
    current: dict[str, Any] = renamed(request, REQUEST_OF_1)
    if isinstance(overrides := current.get("overrides"), Mapping):
        current["overrides"] = {
            glob: renamed(changes, REQUEST_OF_1) for glob, changes in overrides.items()
        }
    if isinstance(refine := current.get("refine"), Mapping):
        refine = dict(refine)
        retired = {
            name: value
            for name, default in DEFAULTS_OF_1.items()
            if (value := refine.pop(name, default)) != default
        }
        if refine.get("rounding") == "adaround":
            retired["rounding"] = refine.pop("rounding")
        current["refine"] = REFINEMENT_BEFORE | refine
        if retired:
            current["retired"] = retired
    return current


def renamed(table: Any, names: Mapping[str, str]) -> Any:
    """Return a table with some keys renamed; return anything else unchanged."""
    if not isinstance(table, Mapping):
        return table
    return {names.get(key, key): value for key, value in table.items()}
