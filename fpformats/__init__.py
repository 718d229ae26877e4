"""Exact low-precision floating-point formats: rounding, encoding, packing.

Every format name that `parse` accepts can be imported as a `FloatFormat`:

    >>> from fpformats import E2M1, E2M1U, quantize
    >>> quantize(1.27, E2M1)
    1.5
    >>> quantize(-1.27, E2M1U)
    0.0
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fpformats.engine.backends import show_backends
from fpformats.engine.bit_packing import pack, unpack
from fpformats.fitting.block_scales import search_blocks
from fpformats.fitting.histogram import Histogram
from fpformats.fitting.search import Choice, search
from fpformats.formats import FloatFormat, Specials, format_name, p3109
from fpformats.ops.block_formats import (
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
    NVFP4_INT4,
    BlockFormat,
    Blocks,
    ScaleRule,
)
from fpformats.ops.blocks import decode_blocks, encode_blocks, quantize_blocks
from fpformats.ops.elementwise import decode, encode, quantize, values
from fpformats.ops.hadamard import hadamard
from fpformats.ops.scaled import decode_scaled, encode_scaled, quantize_scaled
from fpformats.ops.steps import StepEncoder, encode_steps
from fpformats.parsing import dtype_of, parse
from fpformats.rounding import Rounding, Saturation
from fpformats.show.html import html as _html
from fpformats.static_names import *  # noqa: F403

if TYPE_CHECKING:
    from fpformats.ops.parametric import format_parameters, quantize_parametric

__all__ = [
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8_E4M3",
    "MXFP8_E5M2",
    "MXINT8",
    "NVFP4",
    "NVFP4_INT4",
    "BlockFormat",
    "Blocks",
    "Choice",
    "FloatFormat",
    "Histogram",
    "Rounding",
    "Saturation",
    "ScaleRule",
    "Specials",
    "StepEncoder",
    "decode",
    "decode_blocks",
    "decode_scaled",
    "dtype_of",
    "encode",
    "encode_blocks",
    "encode_scaled",
    "encode_steps",
    "format_name",
    "format_parameters",
    "hadamard",
    "p3109",
    "pack",
    "parse",
    "quantize",
    "quantize_blocks",
    "quantize_parametric",
    "quantize_scaled",
    "search",
    "search_blocks",
    "show_backends",
    "unpack",
    "values",
]


def __getattr__(name: str) -> Any:
    """Resolve a format name, as in ``from fpformats import E2M1U``, or a name that needs torch."""
    if name in ("format_parameters", "quantize_parametric"):
        from fpformats.ops import parametric

        return getattr(parametric, name)
    try:
        return parse(name)
    except ValueError as error:
        raise AttributeError(f"module 'fpformats' has no attribute {name!r}: {error}") from None


def __dir__() -> list[str]:
    """List the public names and the formats of `fpformats.static_names`.

    Other formats can be imported too: every name that `parse` accepts.
    """
    formats = (name for name, value in globals().items() if isinstance(value, FloatFormat))
    return sorted([*__all__, *formats])


# Notebooks show a format as a table. The class itself contains no HTML.
FloatFormat._repr_html_ = _html  # type: ignore[attr-defined]
