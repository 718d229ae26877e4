"""What to quantize and how, as frozen objects that JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from msfp.errors import InputError
from msfp.support.checks import (
    MAX_SEED,
    MIN_SEED,
    check_choice,
    check_keys,
    check_names,
    check_number,
    check_truth,
    check_whole,
)
from msfp.support.sizes import parse_size

Scheme = Literal[
    "mixup", "signed", "int_minmax", "int_mse", "int_zero_point", "mx", "nvfp4", "nvfp4_int4"
]
"""Keys of `msfp.search.schemes.SCHEMES`."""
Rounding = Literal["gptq", "nearest"]
"""Keys of `msfp.ptq.rounding.methods.ROUNDINGS`."""
Granularity = Literal["channel", "tensor"]
BiasCorrection = Literal["all", "last", "none"]
BranchMetric = Literal["inputs", "weight"]
MIN_BITS, MAX_BITS = 3, 8
BLOCK_SCHEMES: dict[str, dict[int, str]] = {
    "mx": {4: "MXFP4", 6: "MXFP6_E2M3", 8: "MXINT8"},
    "nvfp4": {4: "NVFP4", 8: "MXINT8"},
    "nvfp4_int4": {4: "NVFP4_INT4", 8: "MXINT8"},
}
"""The formats of each block scheme by bit width; blocks of elements share a scale."""
MAX_RANK = 256
MAX_BUDGET = 32
"""Most bits for each weight, which is full precision."""
FIRST_LAYERS = ("conv_in", "pos_embed.proj", "patch_embed.proj", "x_embedder", "img_in")
LAST_LAYERS = ("conv_out", "proj_out", "proj_out_2")
"""Names of the input layer and of the output layer in diffusers' denoisers."""


class LayerSettings(NamedTuple):
    """Settings of the search for one layer; the fields are those of `QuantizationConfig`."""

    weight_bits: int
    activation_bits: int | None
    scheme: Scheme
    granularity: Granularity
    branch_rank: int | None = None  # None for that of the refinement

    @property
    def needs_calibration(self) -> bool:
        """Whether the search needs calibration of the layer's input; block formats do not."""
        return self.activation_bits is not None and self.scheme not in BLOCK_SCHEMES

    def check(self) -> None:
        """Raise InputError if a value is out of range or the scheme has no format of that width."""
        check_choice("scheme", self.scheme, get_args(Scheme))
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_bits("weight_bits", self.weight_bits, self.scheme)
        if self.activation_bits is not None:
            check_bits("activation_bits", self.activation_bits, self.scheme)
        if self.branch_rank is not None:
            check_whole("branch_rank", self.branch_rank, 0, MAX_RANK)


def check_bits(name: str, bits: Any, scheme: str) -> None:
    """Raise InputError unless a scheme has formats of a bit width."""
    check_whole(name, bits, MIN_BITS, MAX_BITS)
    allowed = BLOCK_SCHEMES.get(scheme)
    if allowed is not None and bits not in allowed:
        raise InputError(
            f"{name} must be one of {tuple(allowed)} with scheme {scheme!r}, not {bits}"
        )


@dataclass(frozen=True)
class RefinementConfig:
    """How the weights of a quantized denoiser are rounded again and corrected, without training.

    Attributes:
        rounding: How weights are rounded. "gptq" lets each weight compensate for the errors of the
            weights rounded before it; "nearest" rounds each weight independently.
        match_inputs: Whether weights are fitted to the quantized input before they are rounded, so
            that the output is closest to the full-precision output.
        correct_bias: Which biases correct the mean error of the output: those of "all" layers, only
            that of the "last" layer, or "none". "last" removes the mean shift of the prediction.
        split_inputs: Whether an input that is a concatenation gets one scale for each of its parts.
        token_scales: Whether linear layers get a scale for each token of their input, where that
            has less error. It is computed from the token when the layer runs.
        rotate_inputs: Whether groups of input channels are rotated before they are rounded, where
            the output of the layer has less error. The layer does so when it runs.
        search_input_scales: Whether layers in block formats of less than 8 bits search the scale of
            each block of their input when they run. It has less error than that of the format's
            rule, and takes several times as long.
        branch_rank: Rank of the low-rank branch beside each layer of less than 8 bits; 0 for no
            branch.
        branch_bits: Bits of the inputs and of the first factor of branches: 8, which integer units
            compute, where that is accurate enough for the input of the layer; or 16 for full
            precision everywhere.
        branch_metric: Which part of a weight its branch takes. "inputs" weighs the columns of the
            weight by how large the input channels are; "weight" weighs them equally, as SVDQuant.
        damping: Value added to the diagonal of the second moments, in units of the mean of that
            diagonal. A larger value keeps the weights closer to full precision.
        samples: Largest number of noisy samples in the forward pass. The batch is twice as large.
            None means 256, or fewer where samples are large: at most 2^20 numbers in all, but at
            least 64 samples.
        batch: Largest number of samples in one forward. Fewer need less memory; the last bits of
            the result may differ. None means as many as have 2^16 numbers in all, at least 1.
        positions: Largest number of pixels or tokens of these samples in the moments.
        seed: Seed of the random draws.

    Raises:
        InputError: If a value is out of range or of another type.

    Example:
        >>> RefinementConfig(branch_rank=0)  # nothing beside the quantized weights
        RefinementConfig(rounding='gptq', match_inputs=True, correct_bias='all', split_inputs=True,
            token_scales=False, rotate_inputs=True, search_input_scales=False, branch_rank=0,
            branch_bits=8, branch_metric='inputs', damping=0.03, samples=None, batch=None,
            positions=16384, seed=0)
    """

    rounding: Rounding = "gptq"
    match_inputs: bool = True
    correct_bias: BiasCorrection = "all"
    split_inputs: bool = True
    token_scales: bool = False
    rotate_inputs: bool = True
    search_input_scales: bool = False
    branch_rank: int = 16
    branch_bits: Literal[8, 16] = 8
    branch_metric: BranchMetric = "inputs"
    damping: float = 0.03
    samples: int | None = None
    batch: int | None = None
    positions: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, get_args(Rounding))
        check_choice("correct_bias", self.correct_bias, get_args(BiasCorrection))
        for name in (
            "match_inputs", "split_inputs", "token_scales", "rotate_inputs", "search_input_scales",
        ):  # fmt: skip
            check_truth(name, getattr(self, name))
        check_whole("branch_rank", self.branch_rank, 0, MAX_RANK)
        check_choice("branch_bits", self.branch_bits, (8, 16))
        check_choice("branch_metric", self.branch_metric, get_args(BranchMetric))
        check_number("damping", self.damping, 1e-6, 1e3)
        if self.samples is not None:
            check_whole("samples", self.samples, 1, 10**6)
        if self.batch is not None:
            check_whole("batch", self.batch, 1, 10**6)
        check_whole("positions", self.positions, 1, 10**9)
        check_whole("seed", self.seed, MIN_SEED, MAX_SEED)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class QuantizationConfig:
    """Bit widths and search settings of post-training quantization.

    Attributes:
        weight_bits: Bits of the weights, 3 to 8.
        activation_bits: Bits of every layer's input, 3 to 8, or None to leave inputs unquantized.
        end_bits: Bits of the weights and inputs of the first and last layer.
        scheme: Number formats to search. "mixup" is the paper's mixup-sign floating point: signed,
            or unsigned with a zero point, whichever has less error. "signed" is signed floating
            point only. "int_minmax" is symmetric integers without clipping. "int_mse" is symmetric
            integers with a searched clipping range. "int_zero_point" is "int_mse" with a zero point
            where "mixup" may have one. "mx" and "nvfp4" are the block formats of OCP and NVIDIA.
            "nvfp4_int4" is NVFP4 in which each block has floating-point numbers or integers,
            whichever have less error. Blocks need no calibration. "mx" has 4 and 6 bits, the other
            two have 4, and all have 8 bits as MXINT8.
        include: Layers to quantize: globs of the dotted names of layers or of modules around them.
        exclude: Layers to leave in full precision: globs as in `include`.
        first_layers: The layers that read the noisy sample: globs of whole names. By default,
            calibration finds them: the first layer whose input changes with the sample, and others
            that read the sample itself. Without calls they are those with one of these names.
        last_layers: The layers that write the prediction: globs of whole names, as in
            `first_layers`. By default they are those whose output is the prediction in any order,
            or else the last layer whose input changes with the sample.
        granularity: Which weights share a scale: those of each output "channel", or those of the
            whole "tensor". Block formats have one scale for each block.
        overrides: Other values of `weight_bits`, `activation_bits`, `scheme`, `granularity` or
            `branch_rank` for some layers, by glob as in `include`. They take precedence over
            `end_bits`, and later globs over earlier ones.
        budget: What quantized layers may have in the file: bits for each of their weights, scales
            of weights and low-rank branches included, as in 4.5; or the size of the denoiser's
            tensors, as in "500MB". Scales of inputs, which are few, are not counted.
            Each layer then gets the bits of its weights (3, 4, 6 or 8) and the rank of its branch
            (up to 64) that give the least error of the prediction. First and last layers whose
            bits differ from the others, and layers whose `weight_bits` or `branch_rank` is in
            `overrides`, keep theirs. None gives all layers the same. Without refinement, and with
            its `branch_rank=0`, no layer gets a branch.
        refine: How weights are corrected after the search. "auto" applies the defaults of
            `RefinementConfig` if the scheme is "mixup", "signed" or one of blocks, and there are
            calls to record.
            None rounds each weight to the nearest value, as the paper does.
        attention_bits: Bits of the operands of the matrix products in attention, or None to leave
            them unquantized.

    Raises:
        InputError: If a value is out of range or of another type.

    Example:
        >>> QuantizationConfig(weight_bits=4, activation_bits=6).bits("first")
        (8, 8)
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    end_bits: int = 8
    scheme: Scheme = "mixup"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    first_layers: tuple[str, ...] = FIRST_LAYERS
    last_layers: tuple[str, ...] = LAST_LAYERS
    granularity: Granularity = "channel"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    budget: float | str | None = None
    refine: RefinementConfig | Literal["auto"] | None = "auto"
    attention_bits: int | None = None

    def __post_init__(self) -> None:
        self.settings("inner").check()
        check_bits("end_bits", self.end_bits, self.scheme)
        for name in ("include", "exclude", "first_layers", "last_layers"):
            object.__setattr__(self, name, check_names(name, getattr(self, name)))
        check_overrides(self.overrides)
        _check_budget(self.budget, self.scheme)
        object.__setattr__(self, "refine", _refinement(self.refine))
        if self.attention_bits is not None:
            check_whole("attention_bits", self.attention_bits, MIN_BITS, MAX_BITS)

    def bits(self, position: Literal["first", "inner", "last"]) -> tuple[int, int | None]:
        """Return the bits of the weights and of the input of a layer at a position."""
        if position == "inner":
            return self.weight_bits, self.activation_bits
        return self.end_bits, None if self.activation_bits is None else self.end_bits

    def settings(self, position: Literal["first", "inner", "last"]) -> LayerSettings:
        """Return the settings of a layer at a position, without overrides."""
        return LayerSettings(*self.bits(position), self.scheme, self.granularity)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)


def _check_budget(budget: Any, scheme: str) -> None:
    """Raise InputError unless a budget is bits for each weight, a size, or None."""
    if budget is None:
        return
    if scheme in BLOCK_SCHEMES:
        raise InputError(f"budget must be None with scheme {scheme!r}, not {budget!r}")
    if isinstance(budget, str):
        parse_size("budget", budget)
    else:
        check_number("budget", budget, MIN_BITS, MAX_BUDGET)


def _refinement(refine: Any) -> RefinementConfig | Literal["auto"] | None:
    """Return `refine`, with a table of fields converted to a `RefinementConfig`."""
    if isinstance(refine, Mapping):
        check_keys("refine", refine, [each.name for each in dataclasses.fields(RefinementConfig)])
        return RefinementConfig(**refine)
    if refine is None or isinstance(refine, RefinementConfig):
        return refine
    if refine == "auto":
        return "auto"
    raise InputError(f"refine must be a RefinementConfig, 'auto' or None, not {refine!r}")


def check_overrides(overrides: Any) -> None:
    """Raise InputError unless overrides map globs to fields of `LayerSettings`."""
    if not isinstance(overrides, Mapping):
        raise InputError(f"overrides must be a table of settings by glob, not {overrides!r}")
    for glob, changes in overrides.items():
        check_keys(f"overrides of {glob!r}", changes, LayerSettings._fields)
