"""What to quantize and how, as two frozen, JSON-able objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from msfp.errors import InputError

Scheme = Literal["mixup", "signed", "int_minmax", "int_mse", "int_zero_point", "mx", "nvfp4"]
Granularity = Literal["channel", "tensor"]
ScaleSearch = Literal["weight", "diagonal", "output"]
BiasCorrection = Literal["all", "last", "none"]
Rounding = Literal["nearest", "gptq", "adaround"]
MIN_BITS, MAX_BITS = 3, 8
FLOAT_SCHEMES = ("mixup", "signed")
BLOCK_SCHEMES: dict[str, dict[int, str]] = {
    "mx": {4: "MXFP4", 6: "MXFP6_E2M3", 8: "MXFP8_E4M3"},
    "nvfp4": {4: "NVFP4", 8: "MXFP8_E4M3"},
}
"""The formats of the schemes whose blocks of elements share a scale, by their width."""
MAX_HUB, MAX_RANK = 16, 256
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
"""What generators of torch take."""
FIRST_LAYERS = ("conv_in", "pos_embed.proj", "patch_embed.proj", "x_embedder", "img_in")
LAST_LAYERS = ("conv_out", "proj_out", "proj_out_2")
"""What diffusers' denoisers call the layer that reads the sample and the one that writes it."""


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise InputError unless a number, which a truth value is not, lies between two others."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a number, not {value!r}")
    _check_between(name, value, low, high)


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Raise InputError unless a whole number, one that JSON can hold, lies between two others."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be a whole number, not {value!r}")
    _check_between(name, value, low, high)


def _check_between(name: str, value: Any, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{name} must be between {low} and {high}, not {value}")


def check_truth(name: str, value: Any) -> None:
    """Raise InputError unless a value is True or False."""
    if value is not True and value is not False:
        raise InputError(f"{name} must be True or False, not {value!r}")


def check_type(name: str, value: object, allowed: type) -> None:
    """Raise InputError unless a value is of a class."""
    if not isinstance(value, allowed):
        given = type(value).__name__
        raise InputError(f"{name} must be of the type {allowed.__name__}, not {given}")


def check_names(name: str, value: Any) -> tuple[str, ...]:
    """Return names or globs as a tuple; raise InputError unless they are a sequence of strings."""
    listed = isinstance(value, Iterable) and not isinstance(value, str)
    if not listed or not all(isinstance(each, str) for each in value):
        raise InputError(f"{name} must be a list of names or globs, not {value!r}")
    return tuple(value)


class LayerSettings(NamedTuple):
    """What is to be searched for one layer; the fields are those of `QuantizationConfig`."""

    weights: int
    activations: int | None
    scheme: Scheme
    granularity: Granularity

    @property
    def needs_calibration(self) -> bool:
        """Whether the search needs to know the layer's input: blocks are scaled as they come."""
        return self.activations is not None and self.scheme not in BLOCK_SCHEMES

    def check(self) -> None:
        """Raise InputError if a value is out of range, or the scheme has no format so wide."""
        for name, bits in (("weights", self.weights), ("activations", self.activations)):
            if name != "activations" or bits is not None:
                check_bits(name, bits, self.scheme)
        check_choice("scheme", self.scheme, get_args(Scheme))
        check_choice("granularity", self.granularity, get_args(Granularity))


def check_bits(name: str, bits: Any, scheme: str) -> None:
    """Raise InputError unless a scheme has formats of a width."""
    check_whole(name, bits, MIN_BITS, MAX_BITS)
    allowed = BLOCK_SCHEMES.get(scheme)
    if allowed is not None and bits not in allowed:
        raise InputError(
            f"{name} must be one of {tuple(allowed)} with scheme {scheme!r}, not {bits}"
        )


def check_choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    """Raise InputError unless a value is one of those allowed."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {allowed}, not {value!r}")


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
        match_inputs: Whether the weights that are rounded are those that give the full-precision
            output best from the quantized input, or the full-precision weights.
        correct_bias: Whose bias makes up for the mean error of its layer's output: that of every
            layer, or of the last alone, which takes the mean shift from the prediction.
        split_inputs: Whether layers that read a concatenation get a scale for each of its parts.
        branch_rank: Rank of the branch of full precision beside each layer of less than 8 bits; 0
            for none.
        damping: Strength of the pull towards the full-precision weights, and of the diagonal that
            GPTQ adds to the second moments, in units of their mean diagonal.
        samples: Noisy samples in the one forward, at most; it holds each of them twice. None for
            256, but fewer where samples are large: not over 2^20 numbers in all, nor under 64
            samples.
        positions: Pixels or tokens, drawn from these samples, that moments are taken over at most.
        seed: Seed of the draws.

    Raises:
        InputError: If a value is out of range or of another type.

    Example:
        >>> RefinementConfig(branch_rank=0)  # nothing beside the quantized weights
        RefinementConfig(rounding='gptq', sweeps=0, scales='weight', match_inputs=True,
            correct_bias='all', split_inputs=True, branch_rank=0, damping=0.03, samples=None,
            positions=16384, seed=0)
    """

    rounding: Rounding = "gptq"
    sweeps: int = 0
    scales: ScaleSearch = "weight"
    match_inputs: bool = True
    correct_bias: BiasCorrection = "all"
    split_inputs: bool = True
    branch_rank: int = 16
    damping: float = 0.03
    samples: int | None = None
    positions: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, get_args(Rounding))
        check_choice("scales", self.scales, get_args(ScaleSearch))
        check_choice("correct_bias", self.correct_bias, get_args(BiasCorrection))
        for name in ("match_inputs", "split_inputs"):
            check_truth(name, getattr(self, name))
        check_whole("sweeps", self.sweeps, 0, 100)
        check_whole("branch_rank", self.branch_rank, 0, MAX_RANK)
        check_number("damping", self.damping, 1e-6, 1e3)
        if self.samples is not None:
            check_whole("samples", self.samples, 1, 10**6)
        check_whole("positions", self.positions, 1, 10**9)
        check_whole("seed", self.seed, MIN_SEED, MAX_SEED)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)


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
            with a searched one, "int_zero_point" adds to the latter a zero point where "mixup" may;
            "mx" and "nvfp4" are the block formats of OCP and NVIDIA, which need no calibration and
            are not refined: "mx" has 4, 6 and 8 bits, "nvfp4" 4, with MXFP8 where 8 are asked for.
        granularity: What shares a scale of the weights: each output "channel", or the "tensor".
            Blocks have their own.
        include: Layers to quantize: globs of dotted names of layers or of modules around them.
        exclude: Layers to leave in full precision, likewise.
        first: The layer that reads the noisy sample: globs of whole names, of which all that
            match count. Where none does, it is the first that runs during calibration.
        last: The layer that writes the prediction, likewise.
        overrides: Other values of `weights`, `activations`, `scheme` or `granularity` by glob, as
            in `include`. They go before `first_last`, and later ones before earlier ones.
        refine: How weights are corrected once their grids are found. "auto" does so by the
            defaults of `RefinementConfig` where the scheme is "mixup" or "signed" and there are
            calls to record; None rounds each weight to the nearest value, as the paper does.
        attention: Bits of the operands of attention's products, or None to leave them as they are.

    Raises:
        InputError: If a value is out of range or of another type.

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
    granularity: Granularity = "channel"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refine: RefinementConfig | Literal["auto"] | None = "auto"
    attention: int | None = None

    def __post_init__(self) -> None:
        self.settings("inner").check()
        check_bits("first_last", self.first_last, self.scheme)
        for name in ("include", "exclude", "first", "last"):
            object.__setattr__(self, name, check_names(name, getattr(self, name)))
        check_overrides(self.overrides)
        object.__setattr__(self, "refine", _refinement(self.refine))
        if self.attention is not None:
            check_whole("attention", self.attention, MIN_BITS, MAX_BITS)

    def bits(self, position: Literal["first", "inner", "last"]) -> tuple[int, int | None]:
        """Return the bits of weights and inputs of a layer at a position."""
        if position == "inner":
            return self.weights, self.activations
        return self.first_last, None if self.activations is None else self.first_last

    def settings(self, position: Literal["first", "inner", "last"]) -> LayerSettings:
        """Return the settings of a layer at a position that no override names."""
        return LayerSettings(*self.bits(position), self.scheme, self.granularity)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)


def _refinement(refine: Any) -> RefinementConfig | Literal["auto"] | None:
    """Return what `refine` may be, from that or from a table of its fields."""
    if isinstance(refine, Mapping):
        unknown = refine.keys() - {each.name for each in dataclasses.fields(RefinementConfig)}
        if unknown:
            raise InputError(f"refine has no field {min(unknown)!r}")
        return RefinementConfig(**refine)
    if refine is None or isinstance(refine, RefinementConfig):
        return refine
    if refine == "auto":
        return "auto"
    raise InputError(f"refine must be a RefinementConfig, 'auto' or None, not {refine!r}")


def check_overrides(overrides: Any) -> None:
    """Raise InputError unless overrides are fields of `LayerSettings` by glob."""
    if not isinstance(overrides, Mapping) or not all(
        isinstance(changes, Mapping) for changes in overrides.values()
    ):
        raise InputError(f"overrides must be a table of settings by glob, not {overrides!r}")
    for glob, changes in overrides.items():
        unknown = changes.keys() - set(LayerSettings._fields)
        if unknown:
            raise InputError(
                f"overrides has {min(unknown)!r} for {glob!r}: it may have "
                f"{', '.join(LayerSettings._fields)}"
            )
