"""Formats in notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fpformats.formats import readable

if TYPE_CHECKING:
    from fpformats.formats import FloatFormat


def html(fmt: FloatFormat) -> str:
    """Describe a format as an HTML table of its facts, for notebooks.

    Args:
        fmt: The format.

    Returns:
        The table, without the codes.
    """
    facts = {
        "bits": fmt.bits,
        "sign": "signed" if fmt.signed else "unsigned",
        "exponent bits": fmt.exponent_bits,
        "mantissa bits": fmt.mantissa_bits,
        "bias": fmt.bias,
        "largest": readable(fmt.exact_max),
        "smallest above zero": readable(fmt.exact_smallest),
        "specials": fmt.specials.value,
        "subnormals": "yes" if fmt.subnormals else "no",
        "zero": "yes" if fmt.zero else "no",
    }
    rows = "".join(f"<tr><th>{name}</th><td>{fact}</td></tr>" for name, fact in facts.items())
    return f"<table><caption>{fmt}</caption>{rows}</table>"
