"""What the search decided for one layer, as plain data that reports carry."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerSummary:
    """The grids of one layer, and what the other choice would have cost.

    Attributes:
        name: Dotted name in the denoiser.
        weight_format: Format of the weights.
        weight_sqnr: Signal to quantization noise of the weights, in dB.
        input_format: Format of the inputs, or None where they are not quantized; the numbers
            below are NaN then.
        input_scale: Scale of the inputs, as searched.
        input_zero_point: Zero point of the inputs, or None where the format is signed.
        asymmetric: Whether the inputs are squeezed against zero from below, as after SiLU.
        input_sqnr: Signal to quantization noise of the calibration inputs, in dB.
        signed_input_sqnr: Likewise with the best signed format.
    """

    name: str
    weight_format: str
    weight_sqnr: float
    input_format: str | None = None
    input_scale: float = math.nan
    input_zero_point: float | None = None
    asymmetric: bool = False
    input_sqnr: float = math.nan
    signed_input_sqnr: float = math.nan

    @property
    def unsigned(self) -> bool:
        """Whether the inputs are quantized to an unsigned format."""
        return self.input_zero_point is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)
