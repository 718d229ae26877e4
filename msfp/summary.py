"""What the search decided for one layer, as plain data that reports and checkpoints carry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerSummary:
    """The grids of one layer, and what the other choice would have cost.

    Attributes:
        name: Dotted name in the denoiser.
        weight_format: Format of the weights.
        input_format: Format of the inputs.
        input_scale: Scale of the inputs, as searched.
        input_zero_point: Zero point of the inputs, or None where the format is signed.
        asymmetric: Whether the inputs are squeezed against zero from below, as after SiLU.
        weight_sqnr: Signal to quantization noise of the weights, in dB.
        input_sqnr: Likewise of the calibration inputs.
        signed_input_sqnr: Likewise with the best signed format.
    """

    name: str
    weight_format: str
    input_format: str
    input_scale: float
    input_zero_point: float | None
    asymmetric: bool
    weight_sqnr: float
    input_sqnr: float
    signed_input_sqnr: float

    @property
    def unsigned(self) -> bool:
        """Whether the inputs are quantized to an unsigned format."""
        return self.input_zero_point is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)
