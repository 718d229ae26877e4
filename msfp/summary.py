"""What the search decided for one layer, as plain data that reports carry."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


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
    def reason(self) -> str | None:
        """Why the inputs count as asymmetric: the activation function before, or the data alone."""
        if not self.asymmetric:
            return None
        return "data" if self.activation is None else self.activation

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types, None for NaN."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }
