"""Format names: from a name to the format it means, and back.

A name is ``E{x}M{y}[B{bias}][U][NS][suffix]``, for x exponent bits and y mantissa bits:

=========  =======================================================================
part       meaning
=========  =======================================================================
``B{b}``   exponent bias b; ``BN{b}`` for the bias -b; without it the default bias
``U``      unsigned: no sign bit
``NS``     no subnormals
``F``      finite only: every code is a number
``FN``     finite with NaN: NaN at all-ones magnitude, no infinity
``IEEE``   infinities and NaNs in the top exponent field
``FNUZ``   finite with NaN at the code of negative zero, unsigned zero
=========  =======================================================================

Without a suffix, signed names with subnormals mean what OCP OFP8 1.0 says they do, whatever the
bias: ``E4M3`` is ``E4M3FN`` (max 448) and ``E5M2`` is ``E5M2IEEE`` (max 57344). Every other name
without a suffix is finite only. ``E8M0`` is the block scale of OCP MX 1.0, which has no zero and
no sign: it is not one of these formats, and the name is refused (``E8M0F`` and ``E8M0U`` are not).

    >>> parse("E2M1U").max
    6.0
    >>> format_name(parse("E4M3FN"))
    'E4M3'
"""

from __future__ import annotations

import re

from fpformats.formats import FloatFormat, Specials, default_bias

GRAMMAR = "E{x}M{y}[B{bias}][U][NS][F|FN|IEEE|FNUZ]"

_NUMBER = r"(?:0|[1-9][0-9]*)"
_NAME = re.compile(
    rf"E(?P<exponent>{_NUMBER})M(?P<mantissa>{_NUMBER})(?:B(?P<bias>N?{_NUMBER}))?"
    r"(?P<unsigned>U)?(?P<no_subnormals>NS)?(?P<suffix>FNUZ|FN|F|IEEE)?"
)
_SUFFIXES = {
    "F": Specials.FINITE_ONLY,
    "FN": Specials.NAN_ONLY,
    "IEEE": Specials.IEEE,
    "FNUZ": Specials.FNUZ,
}
_SUFFIX_OF = {specials: suffix for suffix, specials in _SUFFIXES.items()}
_STANDARD = {(4, 3): Specials.NAN_ONLY, (5, 2): Specials.IEEE, (8, 0): None}
"""Specials of signed names without a suffix, by exponent and mantissa bits."""


def parse(name: str) -> FloatFormat:
    """Give the format that a name means.

    Args:
        name: A name of the grammar in this module's description.

    Returns:
        The format; `str` of it gives its canonical name.

    Raises:
        ValueError: If the name is malformed, or no such format exists.

    Example:
        >>> parse("E4M3")
        FloatFormat(E4M3: 8 bits, signed, bias 7, max 448, NaN at all-ones magnitude, no infinity)
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a format name; the grammar is {GRAMMAR}, as in E2M1U")
    exponent_bits, mantissa_bits = int(match["exponent"]), int(match["mantissa"])
    signed, subnormals = match["unsigned"] is None, match["no_subnormals"] is None
    specials: Specials | None
    if match["suffix"]:
        specials = _SUFFIXES[match["suffix"]]
    else:
        specials = _bare_specials(exponent_bits, mantissa_bits, signed, subnormals)
    if specials is None:
        raise ValueError(
            f"{name!r} is the OCP MX block scale, without zero and sign, which is not supported; "
            "E8M0F is the signed finite-only format with zero, E8M0U the unsigned one"
        )
    if match["bias"]:
        bias = int(match["bias"].replace("N", "-"))
    else:
        bias = default_bias(exponent_bits, specials)
    return FloatFormat(exponent_bits, mantissa_bits, signed, bias, specials, subnormals)


def format_name(fmt: FloatFormat) -> str:
    """Give a format's canonical name: the shortest one that `parse` takes back to it.

    Args:
        fmt: The format.

    Returns:
        The name, a valid Python identifier.

    Example:
        >>> format_name(FloatFormat(3, 0, signed=False, bias=-2))
        'E3M0BN2U'
    """
    name = f"E{fmt.exponent_bits}M{fmt.mantissa_bits}"
    if fmt.bias != default_bias(fmt.exponent_bits, fmt.specials):
        name += f"B{fmt.bias}".replace("-", "N")
    name += "" if fmt.signed else "U"
    name += "" if fmt.subnormals else "NS"
    bare = _bare_specials(fmt.exponent_bits, fmt.mantissa_bits, fmt.signed, fmt.subnormals)
    return name if fmt.specials is bare else name + _SUFFIX_OF[fmt.specials]


def _bare_specials(exponent: int, mantissa: int, signed: bool, subnormals: bool) -> Specials | None:
    if signed and subnormals:
        return _STANDARD.get((exponent, mantissa), Specials.FINITE_ONLY)
    return Specials.FINITE_ONLY
