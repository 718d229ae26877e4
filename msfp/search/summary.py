"""The result of the search for one layer, as plain data for reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from fpformats import parse
from msfp.errors import InputError
from msfp.layers.formats import BlockFormats, LayerFormats


@dataclass(frozen=True)
class LayerSummary:
    """The grids of one layer, and the SQNR of the alternatives.

    Attributes:
        name: Dotted name in the denoiser.
        weight_format: Format of the weights.
        weight_sqnr: Signal-to-quantization-noise ratio (SQNR) of the weights, in dB.
        weight_choices: The best SQNR of the weights in each format, in dB.
        input_format: Format of the inputs, or None if they are not quantized. The numbers below
            are then NaN.
        input_scale: Scale of the inputs, as searched.
        input_zero_point: Zero point of the inputs, or None if the format is signed.
        asymmetric: Whether negative inputs are small compared with positive ones, as after SiLU.
        activation: The activation function that computed the inputs, or None.
        input_sqnr: SQNR of the calibration inputs, in dB.
        signed_input_sqnr: SQNR of the calibration inputs in the best signed format, in dB.
        input_choices: SQNR of the calibration inputs in each format, in dB, with the best scale
            and zero point of that format.
    """

    name: str
    weight_format: str
    weight_sqnr: float
    weight_choices: dict[str, float] = field(default_factory=dict)
    input_format: str | None = None
    input_scale: float = math.nan
    input_zero_point: float | None = None
    asymmetric: bool = False
    activation: str | None = None
    input_sqnr: float = math.nan
    signed_input_sqnr: float = math.nan
    input_choices: dict[str, float] = field(default_factory=dict)

    @property
    def unsigned(self) -> bool:
        """Whether the inputs are quantized to an unsigned format."""
        return self.input_zero_point is not None

    @property
    def other_sign_sqnr(self) -> float:
        """The best SQNR in dB among formats of the other sign, or NaN if none was searched.

        Example:
            >>> choices = {"E2M1": 18.0, "E3M0": 15.0, "E2M2U": 22.5}
            >>> LayerSummary("a", "E2M1", 20.0, input_format="E2M2U", input_zero_point=-0.3,
            ...     input_choices=choices).other_sign_sqnr
            18.0
        """
        lost = [
            db for name, db in self.input_choices.items() if parse(name).signed is self.unsigned
        ]
        return max(lost, default=math.nan)

    @property
    def reason(self) -> str | None:
        """Why inputs are asymmetric: the activation function before, or "data"; else None."""
        if not self.asymmetric:
            return None
        return "data" if self.activation is None else self.activation

    def with_formats(self, formats: LayerFormats | BlockFormats | None) -> Self:
        """Return the summary with the current formats of its layer; None changes nothing.

        Example:
            >>> summary = LayerSummary("a", "E2M1", 20.0, {"E2M1": 20.0, "E3M0": 15.0})
            >>> summary.with_formats(LayerFormats(parse("E3M0"))).weight_sqnr
            15.0
        """
        if formats is None:
            return self
        weight, inputs = str(formats.weight), formats.input
        same = weight == self.weight_format
        return replace(
            self,
            weight_format=weight,
            weight_sqnr=self.weight_sqnr if same else self.weight_choices.get(weight, math.nan),
            input_format=None if inputs is None else str(inputs),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types, None for NaN."""
        plain: dict[str, Any] = {}
        for key, value in vars(self).items():
            unknown = isinstance(value, float) and math.isnan(value)
            plain[key] = None if unknown else dict(value) if isinstance(value, dict) else value
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the summary from the result of `to_dict`.

        Raises:
            InputError: If a key is unknown or missing, or a value has the wrong type.

        Example:
            >>> summary = LayerSummary("conv_in", "E2M1", 20.5)
            >>> str(LayerSummary.from_dict(summary.to_dict())) == str(summary)
            True
        """
        if not isinstance(values, Mapping):
            raise InputError(f"the summary of a layer must be a table, not {values!r}")
        known = {each.name: each for each in fields(cls)}
        restored: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise InputError(f"the summary of a layer has the unknown key {key!r}")
            unknown_number = known[key].type == "float" and value is None
            restored[key] = math.nan if unknown_number else value
            if not _is_a(known[key].type, restored[key]):
                raise InputError(f"{key} in the summary of a layer must not be {value!r}")
        missing = {"name", "weight_format", "weight_sqnr"} - restored.keys()
        if missing:
            raise InputError(f"the summary of a layer lacks {min(missing)!r}")
        return cls(**restored)


def _is_a(kind: Any, value: Any) -> bool:
    """Return whether a value has the annotated type of a field."""
    kinds: dict[str, Any] = {"str": str, "float": float, "int": int, "bool": bool}
    if kind == "dict[str, float]":
        return isinstance(value, dict) and all(isinstance(db, float) for db in value.values())
    if kind.endswith(" | None"):
        return value is None or _is_a(kind.removesuffix(" | None"), value)
    return isinstance(value, kinds[kind])
