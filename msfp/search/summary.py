"""What the search decided for one layer, as plain data that reports carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from fpformats import parse
from msfp.errors import InputError
from msfp.layers.formats import BlockFormats, LayerFormats


@dataclass(frozen=True)
class LayerSummary:
    """The grids of one layer, and what the other choices would have cost.

    Attributes:
        name: Dotted name in the denoiser.
        weight_format: Format of the weights.
        weight_sqnr: Signal to quantization noise of the weights, in dB.
        weight_choices: The best that each format could do for the weights, likewise.
        input_format: Format of the inputs, or None where they are not quantized; the numbers
            below are NaN then.
        input_scale: Scale of the inputs, as searched.
        input_zero_point: Zero point of the inputs, or None where the format is signed.
        asymmetric: Whether the negative inputs are small beside the positive, as after SiLU.
        activation: The activation function that computed the inputs, where there is one.
        input_sqnr: Signal to quantization noise of the calibration inputs, in dB.
        signed_input_sqnr: Likewise with the best signed format.
        input_choices: Likewise with the best scale and zero point of each format.
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
        """The best SQNR in dB of the formats of the other sign, NaN if none was searched.

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
        """Why the inputs count as asymmetric: the activation function before, or the data alone."""
        if not self.asymmetric:
            return None
        return "data" if self.activation is None else self.activation

    def with_formats(self, formats: LayerFormats | BlockFormats | None) -> Self:
        """Return the summary with the formats that its layer has now; None leaves it as it is.

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
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the summary that `to_dict` wrote.

        Raises:
            InputError: If a key is unknown, or a value is not of its kind.

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
    """Return whether a value is of the type that a field is annotated with."""
    kinds: dict[str, Any] = {"str": str, "float": float, "int": int, "bool": bool}
    if kind == "dict[str, float]":
        return isinstance(value, dict) and all(isinstance(db, float) for db in value.values())
    if kind.endswith(" | None"):
        return value is None or _is_a(kind.removesuffix(" | None"), value)
    return isinstance(value, kinds[kind])
