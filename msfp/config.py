"""What to quantize and how, as two frozen, JSON-able objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from msfp.errors import InputError

Scheme = Literal["mixup", "signed", "int_minmax", "int_mse", "int_zero_point"]
MIN_BITS, MAX_BITS = 3, 8
MAX_HUB, MAX_RANK = 16, 256
FIRST_LAYERS = ("conv_in", "pos_embed.proj", "patch_embed.proj", "x_embedder", "img_in")
LAST_LAYERS = ("conv_out", "proj_out", "proj_out_2")
"""What diffusers' denoisers call the layer that reads the sample and the one that writes it."""


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise InputError unless low <= value <= high."""
    if not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} must be between {low} and {high}, not {value}")


def check_names(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """Return names or globs as a tuple; raise InputError unless they are a sequence of strings."""
    if isinstance(value, str) or not all(isinstance(each, str) for each in value):
        raise InputError(f"{name} must be a list of names or globs, not {value!r}")
    return tuple(value)


@dataclass(frozen=True)
class QuantizationConfig:
    """Bit widths and the search of post-training quantization.

    Attributes:
        weights: Bits of the weights, 3 to 8.
        activations: Bits of every layer's input, 3 to 8, or None to leave inputs as they are.
        first_last: Bits of weights and input of the denoiser's first and last layer.
        scheme: Which grids are searched. "mixup" is the paper's mixup-sign floating point
            (signed, or unsigned with a zero point, whichever has less error), "signed" is signed
            floating point alone; "int_minmax" and "int_mse" are symmetric integers with no clip and
            with a searched one, "int_zero_point" adds to the latter a zero point where "mixup" may.
        include: Layers to quantize: globs of dotted names of layers or of modules around them.
        exclude: Layers to leave in full precision, likewise.
        first: The layer that reads the noisy sample: globs of whole names, of which all that
            match count. Where none does, it is the first that runs during calibration.
        last: The layer that writes the prediction, likewise.

    Raises:
        InputError: If a value is out of range.

    Example:
        >>> QuantizationConfig(weights=4, activations=6).bits("first")
        (8, 8)
    """

    weights: int = 4
    activations: int | None = 4
    first_last: int = 8
    scheme: Scheme = "mixup"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    first: tuple[str, ...] = FIRST_LAYERS
    last: tuple[str, ...] = LAST_LAYERS

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "first_last"):
            if name != "activations" or self.activations is not None:
                check_range(name, getattr(self, name), MIN_BITS, MAX_BITS)
        for name in ("include", "exclude", "first", "last"):
            object.__setattr__(self, name, check_names(name, getattr(self, name)))
        if self.scheme not in get_args(Scheme):
            raise InputError(f"scheme must be one of {get_args(Scheme)}, not {self.scheme!r}")

    def bits(self, position: Literal["first", "inner", "last"]) -> tuple[int, int | None]:
        """Return the bits of weights and inputs of a layer at a position."""
        if position == "inner":
            return self.weights, self.activations
        return self.first_last, None if self.activations is None else self.first_last

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
