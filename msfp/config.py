"""What to quantize and how, as two frozen, JSON-able objects."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from msfp.errors import InputError

Scheme = Literal["mixup", "signed", "int_minmax", "int_mse", "int_zero_point"]
ScaleSearch = Literal["weight", "diagonal", "output"]
BiasCorrection = Literal["all", "last", "none"]
Rounding = Literal["nearest", "gptq", "adaround"]
MIN_BITS, MAX_BITS = 3, 8
MAX_HUB, MAX_RANK = 16, 256


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise InputError unless low <= value <= high."""
    if not low <= value <= high:
        raise InputError(f"{name} must be between {low} and {high}, not {value}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise InputError unless a value is one of those allowed."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {allowed}, not {value!r}")


@dataclass(frozen=True)
class QuantizationConfig:
    """Bit widths and the search of post-training quantization.

    Attributes:
        weights: Bits of the weights, 3 to 8.
        activations: Bits of every layer's input, 3 to 8.
        first_last: Bits of weights and input of the denoiser's first and last layer.
        scheme: Which grids are searched. "mixup" is the paper's mixup-sign floating point
            (signed, or unsigned with a zero point, whichever has less error), "signed" is signed
            floating point alone; "int_minmax" and "int_mse" are symmetric integers with no clip and
            with a searched one, "int_zero_point" adds to the latter a zero point where "mixup" may.

    Raises:
        InputError: If a value is out of range.

    Example:
        >>> QuantizationConfig(weights=4, activations=6).bits("first")
        (8, 8)
    """

    weights: int = 4
    activations: int = 4
    first_last: int = 8
    scheme: Scheme = "mixup"

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "first_last"):
            check_range(name, getattr(self, name), MIN_BITS, MAX_BITS)
        check_choice("scheme", self.scheme, get_args(Scheme))

    def bits(self, position: Literal["first", "inner", "last"]) -> tuple[int, int]:
        """Return the bits of weights and activations of a layer at a position."""
        if position == "inner":
            return self.weights, self.activations
        return self.first_last, self.first_last

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class FinetuneConfig:
    """How a quantized denoiser is brought back.

    Attributes:
        hub: LoRAs per layer; 1 is a single LoRA without a router, 2 or 4 is the paper's TALoRA.
        rank: Rank of each LoRA.
        steps: Optimizer steps.
        batch: Samples in a step.
        learning_rate: Initial rate of the adapters, in units of each layer's mean weight scale; it
            falls to zero linearly.
        denoising_power: The power of the denoising factor that the loss at a timestep is weighted
            by: 0 is no weighting, 1 the paper's DFA, 2 exact for squared errors of the next sample.
        seed: Seed of initialisation and batches.

    Raises:
        InputError: If a value is out of range.
    """

    hub: int = 1
    rank: int = 16
    steps: int = 240
    batch: int = 32
    learning_rate: float = 0.01
    denoising_power: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("hub", self.hub, 1, MAX_HUB)
        check_range("rank", self.rank, 1, MAX_RANK)
        check_range("steps", self.steps, 1, 10**9)
        check_range("batch", self.batch, 1, 10**6)
        check_range("learning_rate", self.learning_rate, 0, 1)
        check_range("denoising_power", self.denoising_power, 0, 4)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RefinementConfig:
    """How the weights of a quantized denoiser are rounded anew and corrected, without training.

    Attributes:
        rounding: "gptq" rounds each weight to make up for the errors of those before it,
            "adaround" learns which of its neighbours each takes, "nearest" rounds each by itself.
        sweeps: Rounds of coordinate descent after GPTQ.
        scales: "weight" keeps format and scales as searched on the weights alone; "output" searches
            them anew by the error of the layer's output, "diagonal" by that error where columns
            are taken to share nothing.
        split_inputs: Whether layers that read a concatenation get a scale for each of its parts.
        match_inputs: Whether the weights that are rounded are those that give the full-precision
            output best from the quantized input, or the full-precision weights.
        correct_bias: Whose bias makes up for the mean error of its layer's output: that of every
            layer, or of the last alone, which takes the mean shift from the prediction.
        damping: Strength of the pull towards the full-precision weights, and of the diagonal that
            GPTQ adds to the second moments, in units of their mean diagonal.
        samples: Noisy samples in the one forward; all of a layer's inputs are held at once.
        positions: Pixels or tokens, drawn from these samples, that moments are taken over at most.
        seed: Seed of the draws.

    Raises:
        InputError: If a value is out of range.
    """

    rounding: Rounding = "gptq"
    sweeps: int = 0
    scales: ScaleSearch = "weight"
    split_inputs: bool = False
    match_inputs: bool = True
    correct_bias: BiasCorrection = "all"
    damping: float = 0.03
    samples: int = 256
    positions: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, get_args(Rounding))
        check_choice("scales", self.scales, get_args(ScaleSearch))
        check_choice("correct_bias", self.correct_bias, get_args(BiasCorrection))
        check_range("sweeps", self.sweeps, 0, 100)
        check_range("damping", self.damping, 1e-6, 1e3)
        check_range("samples", self.samples, 1, 10**6)
        check_range("positions", self.positions, 1, 10**9)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)
