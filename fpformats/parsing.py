"""From a name to the format it means.

A name is ``E{x}M{y}[B{bias}][U][NS|NZ][suffix]``, for x exponent bits and y mantissa bits:

=========  =======================================================================
part       meaning
=========  =======================================================================
``B{b}``   exponent bias b; ``BN{b}`` for the bias -b; without it the default bias
``U``      unsigned: no sign bit
``NS``     no subnormals
``NZ``     no zero, and so no subnormals
``F``      finite only: every code is a number
``FN``     finite with NaN: NaN at all-ones magnitude, no infinity
``IEEE``   infinities and NaNs in the top exponent field
``FNUZ``   finite with NaN at the code of negative zero, unsigned zero
``EXT``    infinity and one NaN, as the extended formats of IEEE P3109
=========  =======================================================================

Case does not matter. Signed names with subnormals and without a suffix follow OCP OFP8 1.0,
whatever the bias: ``E4M3`` is ``E4M3FN`` (max 448) and ``E5M2`` is ``E5M2IEEE`` (max 57344).
``E8M0`` is the block scale of OCP MX 1.0: ``E8M0UNZFN``, unsigned, without zero. Every other name
without a suffix is finite only. Other accepted names:

=============================  ==============  =========================================
name                           the same as     source
=============================  ==============  =========================================
``BF16``                       ``E8M7IEEE``    bfloat16
``FP16``, ``FP32``,            ``E5M10IEEE``,  IEEE 754 binary16, binary32, binary64
``FP64``                       ...
``TF32``                       ``E8M10IEEE``   19 bits of NVIDIA's tensor cores
``UE4M3``, ``UE5M3``           ``E4M3UFN``,    unsigned scales, NaN at all-ones
                               ``E5M3UFN``
``Binary{K}p{P}{s|u}{e|f}``                    IEEE P3109: see `fpformats.p3109`
``FP4``, ``FP8_E4M3``, ...     ``E2M1``,       common names; the width must match
                               ``E4M3``, ...
``float8_e4m3fn``, ...                         a dtype of ml_dtypes, torch or NumPy
=============================  ==============  =========================================

    >>> parse("E2M1U").max
    6.0
    >>> parse("E4M3FN").name
    'E4M3'
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from fpformats.formats import (
    SUFFIXES,
    FloatFormat,
    bare_specials,
    default_bias,
    p3109,
)

GRAMMAR = "E{x}M{y}[B{bias}][U][NS|NZ][F|FN|IEEE|FNUZ|EXT] or Binary{K}p{P}{s|u}{e|f}"

_NUMBER = r"(?:0|[1-9][0-9]*)"
_NAME = re.compile(
    rf"E(?P<exponent>{_NUMBER})M(?P<mantissa>{_NUMBER})(?:B(?P<bias>N?{_NUMBER}))?"
    r"(?P<unsigned>U)?(?P<missing>NS|NZ)?(?P<suffix>FNUZ|FN|F|IEEE|EXT)?"
)
_P3109 = re.compile(rf"BINARY(?P<k>{_NUMBER})P(?P<p>{_NUMBER})(?P<sign>[SU])(?P<domain>[EF])")
_WITH_WIDTH = re.compile(rf"FP(?P<bits>{_NUMBER})_?(?P<name>E.*)")

_ALIASES = {
    "E8M0": "E8M0UNZFN",
    "UE4M3": "E4M3UFN",
    "UE5M3": "E5M3UFN",
    "BF16": "E8M7IEEE",
    "FP16": "E5M10IEEE",
    "FP32": "E8M23IEEE",
    "FP64": "E11M52IEEE",
    "TF32": "E8M10IEEE",
    "FP4": "E2M1",
    "HALF": "FP16",
    "SINGLE": "FP32",
    "DOUBLE": "FP64",
}
_AMBIGUOUS = {"FP6": "E2M3 or E3M2", "FP8": "E4M3 or E5M2", "INT4": "E0M3", "INT8": "E0M7"}
"""Names with several meanings and names of integers, with the formats that may be meant."""
_DTYPES = {
    "float4_e2m1fn": "E2M1",
    "float6_e2m3fn": "E2M3",
    "float6_e3m2fn": "E3M2",
    "float8_e3m4": "E3M4IEEE",
    "float8_e4m3": "E4M3IEEE",
    "float8_e4m3b11fnuz": "E4M3B11FNUZ",
    "float8_e4m3fn": "E4M3",
    "float8_e4m3fnuz": "E4M3FNUZ",
    "float8_e5m2": "E5M2",
    "float8_e5m2fnuz": "E5M2FNUZ",
    "float8_e8m0fnu": "E8M0",
    "bfloat16": "BF16",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
_PACKED = {"float4_e2m1fn_x2": "E2M1"}
"""Dtypes with two codes in each element. They name a format but are not its dtype."""
_LOWER_CASE = {name.lower(): meaning for name, meaning in (_DTYPES | _PACKED).items()}


def parse(name: Any) -> FloatFormat:
    """Give the format of a name.

    Args:
        name: A name by the grammar in this module's docstring, in upper or lower case; or a
            dtype of ml_dtypes, torch or NumPy, or its name.

    Returns:
        The format; its `str` is the canonical name.

    Raises:
        ValueError: If the name is malformed, or no such format exists.

    Example:
        >>> parse("E4M3")
        FloatFormat(E4M3: 8 bits, signed, bias 7, max 448, NaN at all-ones magnitude, no infinity)
        >>> parse("float8_e4m3fn") == parse("E4M3"), parse("torch.float8_e5m2") == parse("E5M2")
        (True, True)
    """
    text = name if isinstance(name, str) else _dtype_name(name)
    plain = text.removeprefix("torch.").removeprefix("ml_dtypes.").removeprefix("numpy.")
    dtype = _LOWER_CASE.get(plain.lower())
    fmt = _named(dtype or text.upper())
    if fmt is None:
        meant = _AMBIGUOUS.get(text.upper())
        advice = f"write {meant}" if meant else f"the grammar is {GRAMMAR}, as in E2M1U"
        if text.upper().startswith(("MX", "NV")):
            advice = "block formats, such as MXFP4, are taken by fpformats.quantize_blocks"
        raise ValueError(f"{name!r} is not a format name; {advice}")
    return fmt


FormatLike = FloatFormat | str
"""A format, or the name of one."""


def as_format(fmt: Any, argument: str = "fmt") -> FloatFormat:
    """Turn a format or its name into the format.

    Args:
        fmt: A format or a name.
        argument: Name of the argument in error messages.

    Raises:
        TypeError: If it is neither.
        ValueError: If no format has the name.
    """
    if isinstance(fmt, FloatFormat):
        return fmt
    if isinstance(fmt, str):
        return parse(fmt)
    raise TypeError(f"{argument} is {fmt!r}; it must be a FloatFormat or a name, such as 'E2M1'")


def dtype_of(fmt: FormatLike, library: str) -> Any:
    """Give the dtype that holds the codes of a format in a library.

    Args:
        fmt: The format, or its name.
        library: "torch", "ml_dtypes" or "numpy", which must be installed.

    Returns:
        The dtype, as the library's own object.

    Raises:
        ImportError: If the library is not installed.
        ValueError: If the library is not one of these, or has no such dtype.

    Example:
        >>> dtype_of(parse("E4M3"), "torch")
        torch.float8_e4m3fn
    """
    if library not in ("torch", "ml_dtypes", "numpy"):
        raise ValueError(f"library is {library!r}; allowed: torch, ml_dtypes, numpy")
    fmt, module = as_format(fmt), importlib.import_module(library)
    for name, meaning in _DTYPES.items():
        if fmt == parse(meaning) and hasattr(module, name):
            return getattr(module, name)
    raise ValueError(f"fmt is {fmt!r}, which {library} has no dtype for")


def _dtype_name(dtype: Any) -> str:
    return dtype.__name__ if isinstance(dtype, type) else str(dtype)


def _named(text: str) -> FloatFormat | None:
    """Give the format of a name in upper case, or None."""
    while text in _ALIASES:
        text = _ALIASES[text]
    if match := _P3109.fullmatch(text):
        signed, extended = match["sign"] == "S", match["domain"] == "E"
        return p3109(int(match["k"]), int(match["p"]), signed=signed, extended=extended)
    if match := _NAME.fullmatch(text):
        return _from_parts(match)
    if match := _WITH_WIDTH.fullmatch(text):
        fmt = _named(match["name"])
        return fmt if fmt is not None and fmt.bits == int(match["bits"]) else None
    return None


def _from_parts(match: re.Match[str]) -> FloatFormat:
    exponent_bits, mantissa_bits = int(match["exponent"]), int(match["mantissa"])
    signed, missing = match["unsigned"] is None, match["missing"]
    if match["suffix"]:
        specials = SUFFIXES[match["suffix"]]
    else:
        specials = bare_specials(exponent_bits, mantissa_bits, signed and not missing)
    if match["bias"]:
        bias = int(match["bias"].replace("N", "-"))
    else:
        bias = default_bias(exponent_bits, specials)
    return FloatFormat(
        exponent_bits, mantissa_bits, signed, bias, specials, not missing, missing != "NZ"
    )
