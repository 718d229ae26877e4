"""Facts about quantized layers and attention modules, and what is said of many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fpformats import FloatFormat
from msfp.errors import InputError
from msfp.layers.formats import BlockFormats, LayerFormats
from msfp.search.summary import LayerSummary
from msfp.support.globs import matches

Facts = TypeVar("Facts", bound="LayerFacts | ProductFacts")
ORDERS = ("model", "layer", "weight_sqnr", "input_sqnr", "cost_of_other_sign", "bytes")
"""Sort keys of layers: decibels in ascending order, bytes in descending order."""


NAMED = 3
"""Number of layers that a sentence names."""


@dataclass(frozen=True)
class LayerFacts:
    """One quantized layer as it is stored, and the result of its search.

    Attributes:
        layer: Dotted name in the denoiser.
        formats: Formats and granularities of the layer.
        weight_clip: The largest weight that can be represented in any output channel or block.
        input_scale: Scale of the inputs, or the largest if each channel has one. If each token has
            one, it is in units of the token's largest magnitude, and so are `clip` and
            `zero_point`. NaN if inputs are
            not quantized, or use block formats, whose scales are computed from each input.
        clip: The smallest and the largest input that can be represented; NaN if `input_scale` is.
        zero_point: Zero point of the inputs, or None if their format is signed.
        bytes: Size of the layer's tensors.
        summary: Result of the search, or None if it was not saved. Refinement and fine-tuning
            change weights and scales afterwards, but not the summary.
        float_reason: Why the layer is computed in floating point. None if integer units, where
            there are any, compute it.
    """

    layer: str
    formats: LayerFormats | BlockFormats
    weight_clip: float
    input_scale: float
    clip: tuple[float, float]
    zero_point: float | None
    bytes: int
    summary: LayerSummary | None
    float_reason: str | None = None

    @property
    def weight(self) -> FloatFormat:
        """Format of the weights; for block formats, that of the elements."""
        if isinstance(self.formats, BlockFormats):
            return self.formats.weight_blocks.element
        return self.formats.weight

    @property
    def input(self) -> FloatFormat | None:
        """Format of the inputs (for block formats, of the elements), or None if not quantized."""
        if isinstance(self.formats, BlockFormats):
            blocks = self.formats.input_blocks
            return None if blocks is None else blocks.element
        return self.formats.input

    @property
    def sign(self) -> str | None:
        """Whether the inputs are "signed" or "unsigned", or None if they are not quantized."""
        if self.input is None:
            return None
        return "signed" if self.input.signed else "unsigned"

    @property
    def weight_sqnr(self) -> float:
        """SQNR of the weights in dB, directly after the search; NaN if unknown."""
        return math.nan if self.summary is None else self.summary.weight_sqnr

    @property
    def input_sqnr(self) -> float:
        """SQNR of the calibration inputs in dB; NaN if unknown."""
        return math.nan if self.summary is None else self.summary.input_sqnr

    @property
    def other_sign_sqnr(self) -> float:
        """The best SQNR in dB among formats of the other sign; NaN if none was searched."""
        return math.nan if self.summary is None else self.summary.other_sign_sqnr

    @property
    def cost_of_other_sign(self) -> float:
        """Loss of SQNR with the other choice of sign, in dB."""
        return self.input_sqnr - self.other_sign_sqnr

    @property
    def reason(self) -> str | None:
        """Why the inputs count as asymmetric, or None."""
        return None if self.summary is None else self.summary.reason

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain JSON types, None for NaN."""
        values = {
            "layer": self.layer,
            "weight_format": str(self.formats.weight),
            "weight_clip": self.weight_clip,
            "weight_sqnr": self.weight_sqnr,
            "input_format": None if self.input is None else str(self.formats.input),
            "sign": self.sign,
            "input_scale": self.input_scale,
            "zero_point": self.zero_point,
            "clip_low": self.clip[0],
            "clip_high": self.clip[1],
            "input_sqnr": self.input_sqnr,
            "other_sign_sqnr": self.other_sign_sqnr,
            "cost_of_other_sign": self.cost_of_other_sign,
            "reason": self.reason,
            "float_reason": self.float_reason,
            "bytes": self.bytes,
        }
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in values.items()
        }


@dataclass(frozen=True)
class ProductFacts:
    """One operand of an attention module's quantized products, as it is stored.

    Attributes:
        layer: Its dotted name: the attention module, `products` and the operand.
        format: Its format.
        scale: Its scale.
        zero_point: Its zero point, or None if it has none.
        clip: The smallest and the largest number that can be represented.
        bytes: Size of its tensors.
    """

    layer: str
    format: FloatFormat
    scale: float
    zero_point: float | None
    clip: tuple[float, float]
    bytes: int

    @property
    def sign(self) -> str:
        """Whether the format is "signed" or "unsigned"."""
        return "signed" if self.format.signed else "unsigned"

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain JSON types, under the same keys as inputs of layers."""
        return {
            "layer": self.layer,
            "input_format": str(self.format),
            "sign": self.sign,
            "input_scale": self.scale,
            "zero_point": self.zero_point,
            "clip_low": self.clip[0],
            "clip_high": self.clip[1],
            "bytes": self.bytes,
        }


def matching(facts: Iterable[Facts], glob: str) -> list[Facts]:
    """Return the facts whose layer, or a module around it, has a name that matches a glob.

    Raises:
        InputError: If no name matches.
    """
    facts = list(facts)
    kept = [each for each in facts if matches(each.layer, glob)]
    if not kept:
        raise InputError(f"filter {glob!r} matches none of the {len(facts)} names")
    return kept


def overview(facts: Sequence[LayerFacts]) -> str:
    """Return the totals of all layers in a sentence."""
    unsigned = sum(each.sign == "unsigned" for each in facts)
    size = sum(each.bytes for each in facts)
    widths = sorted({each.weight.bits for each in facts})
    parts = [f"{sum(each.weight.bits == b for each in facts)} at {b} bits" for b in widths]
    return (
        f"{len(facts)} layers, {size:,} bytes; weights: {', '.join(parts)}; "
        f"inputs: {unsigned} unsigned."
    )


def execution(facts: Sequence[LayerFacts]) -> list[str]:
    """Return how layers are computed, as sentences: how many on integer units, and why not all.

    A sentence names at most `NAMED` layers.
    """
    reasons: dict[str, list[str]] = {}
    for each in facts:
        if each.float_reason is not None:
            reasons.setdefault(each.float_reason, []).append(each.layer)
    on_integers = sum(each.float_reason is None for each in facts)
    sentences = [f"{on_integers} of {len(facts)} layers run on integer units, where there are any."]
    for why, layers in reasons.items():
        named = ", ".join(layers[:NAMED])
        more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
        sentences.append(f"In floating point: {named}{more} ({why}).")
    branches = [
        isinstance(each.formats, LayerFormats) and each.formats.branch_input is not None
        for each in facts
        if each.formats.branch_rank
    ]
    if branches:
        narrow = f"{sum(branches)} of {len(branches)}"
        sentences.append(f"Low-rank branches: {narrow} in 8 bits, the others in floating point.")
    return sentences


def in_order(facts: Iterable[LayerFacts], order: str) -> list[LayerFacts]:
    """Return layers sorted by one of `ORDERS`; layers without that number come last."""
    if order == "model":
        return list(facts)
    if order == "layer":
        return sorted(facts, key=lambda each: each.layer)
    sign = -1 if order == "bytes" else 1

    def key(each: LayerFacts) -> float:
        number = getattr(each, order)
        return math.inf if math.isnan(number) else sign * number

    return sorted(facts, key=key)
