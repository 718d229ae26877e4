"""Tables of the quantized layers and of attention's products, as text."""

from __future__ import annotations

import math

from msfp.checkpoint.facts import LayerFacts, ProductFacts

COLUMNS = (
    "layer", "weights", "weights dB", "inputs", "sign", "zero point", "clip", "inputs dB",
    "other sign dB", "cost dB", "reason", "product", "bytes",
)  # fmt: skip
"""The columns of the per-layer table."""


def cells(facts: LayerFacts) -> tuple[str, ...]:
    """Return a layer's row of the per-layer table as text; unknown values are empty."""
    return (
        facts.layer,
        str(facts.formats.weight),
        _decibels(facts.weight_sqnr),
        "" if facts.input is None else str(facts.formats.input),
        facts.sign or "",
        _zero_point(facts.zero_point),
        _clip(facts.clip),
        _decibels(facts.input_sqnr),
        _decibels(facts.other_sign_sqnr),
        _decibels(facts.cost_of_other_sign),
        facts.reason or "",
        "integers" if facts.float_reason is None else "floats",
        str(facts.bytes),
    )


PRODUCT_COLUMNS = ("operand", "format", "sign", "zero point", "clip", "bytes")
"""The columns of the table of attention's products."""


def product_cells(facts: ProductFacts) -> tuple[str, ...]:
    """Return an operand's row of the table of products as text."""
    return (
        facts.layer,
        str(facts.format),
        facts.sign,
        _zero_point(facts.zero_point),
        _clip(facts.clip),
        str(facts.bytes),
    )


def _zero_point(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


def _clip(clip: tuple[float, float]) -> str:
    return "" if math.isnan(clip[0]) else f"{clip[0]:.3g} to {clip[1]:.3g}"


def _decibels(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.1f}"
