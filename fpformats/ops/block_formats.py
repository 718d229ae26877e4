"""Block formats: the elements of a block have one format and share a scale in another format.

MX (OCP MX 1.0) and NVFP4 (NVIDIA, cuDNN) are presets; any other composition works the same way.

A block format may have two element formats, of which each block has one. The sign bit of the
block's scale says which, since scales are positive: the choice takes no memory. `NVFP4_INT4` is
NVFP4 whose blocks may hold integers instead. IF4 (Cook et al., 2026) makes the same choice. Its
integers have a step of 6/7 of the scale, which no binary format has; here it is the scale itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

from fpformats.formats import FloatFormat
from fpformats.parsing import as_format, parse


class ScaleRule(StrEnum):
    """How the scale follows from the largest magnitude m of a block.

    Here, max is the largest element and E is its exponent: 2**E <= max < 2**(E+1).
    """

    Floor = "Floor"
    """m / 2**E rounded down (OCP MX 1.0, 6.3): the largest values may saturate."""

    Ceil = "Ceil"
    """m / 2**E rounded up."""

    Nearest = "Nearest"
    """m / 2**E rounded to nearest, ties to even."""

    RCeil = "RCeil"
    """m / max rounded up: nothing saturates."""

    Max = "Max"
    """m / max rounded to nearest, ties to even (IEEE P3109, NVFP4)."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A composition of an element format and a scale format.

    Attributes:
        element: Format of the elements; a name becomes its format.
        scale: Format of the scales, likewise.
        size: Number of elements that share a scale.
        rule: How the scale of a block is computed.
        tensor_scale: Whether scales are relative to one float32 scale of the whole tensor. It
            maps the largest scale to the largest value of the scale format.
        twos_complement: Whether the codes of a uniform element format are two's complement
            integers, as in MXINT8.
        alternative: A second format of elements. The blocks that have it are those whose scale has
            the sign bit set: where it has less squared error, rounded to nearest. None if all
            blocks have the same format.

    Raises:
        TypeError: If element, scale or alternative is not a format.
        ValueError: If no format has the name, the size is not a positive integer, the rule is
            unknown, `twos_complement` is True for an element that is not signed and uniform, or
            there is an `alternative` of other bits than the element, with two's complement, or
            with a scale without a sign bit.

    Example:
        >>> import numpy as np
        >>> from fpformats import E2M1U, UE5M3, quantize_blocks
        >>> ours = BlockFormat(E2M1U, UE5M3, 16, ScaleRule.Max)
        >>> quantize_blocks(np.array([0.1, 0.5, 0.9, -0.2]), ours)
        array([0.078125, 0.46875 , 0.9375  , 0.      ])
    """

    element: FloatFormat
    scale: FloatFormat
    size: int
    rule: ScaleRule = ScaleRule.Floor
    tensor_scale: bool = False
    twos_complement: bool = False
    alternative: FloatFormat | None = None

    def __post_init__(self) -> None:
        for name in ("element", "scale", "alternative"):
            if getattr(self, name) is not None or name != "alternative":
                object.__setattr__(self, name, as_format(getattr(self, name), name))
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"size is {self.size!r}; it must be a positive integer")
        if self.rule not in list(ScaleRule):
            raise ValueError(f"rule is {self.rule!r}; allowed: {', '.join(ScaleRule)}")
        uniform = self.element.exponent_bits == 0 and self.element.signed
        if self.twos_complement and not uniform:
            raise ValueError(f"element is {self.element}; two's complement is for signed E0My")
        if self.alternative is not None:
            self._check_alternative(self.alternative)

    def _check_alternative(self, fmt: FloatFormat) -> None:
        if fmt.bits != self.element.bits:
            raise ValueError(
                f"alternative is {fmt} of {fmt.bits} bits; element {self.element} has "
                f"{self.element.bits}"
            )
        if self.twos_complement or not self.scale.signed:
            why = "two's complement" if self.twos_complement else f"the unsigned scale {self.scale}"
            raise ValueError(f"alternative is {fmt}; with {why} it must be None")

    @property
    def choices(self) -> tuple[BlockFormat, ...]:
        """The formats that a block can have: this one, or one for each format of elements."""
        if self.alternative is None:
            return (self,)
        alone = replace(self, alternative=None)
        return alone, replace(alone, element=self.alternative)

    @property
    def largest_element(self) -> float:
        """The largest element that every block can have."""
        return min(choice.element.max for choice in self.choices)


class Blocks(NamedTuple):
    """Encoded blocks.

    Attributes:
        codes: Codes of the elements, of the shape of the data.
        scales: Codes of the scales; along the axis of the blocks, one for each block.
        tensor_scale: The float32 scale of the whole tensor, or several that broadcast to the shape
            of `scales`. None if there is none.
    """

    codes: Any
    scales: Any
    tensor_scale: Any


MXFP8_E4M3 = BlockFormat(parse("E4M3"), parse("E8M0"), 32)
MXFP8_E5M2 = BlockFormat(parse("E5M2"), parse("E8M0"), 32)
MXFP6_E2M3 = BlockFormat(parse("E2M3"), parse("E8M0"), 32)
MXFP6_E3M2 = BlockFormat(parse("E3M2"), parse("E8M0"), 32)
MXFP4 = BlockFormat(parse("E2M1"), parse("E8M0"), 32)
MXINT8 = BlockFormat(parse("E0M7"), parse("E8M0"), 32, twos_complement=True)
NVFP4 = BlockFormat(parse("E2M1"), parse("E4M3"), 16, ScaleRule.Max, tensor_scale=True)
NVFP4_INT4 = replace(NVFP4, alternative=parse("E0M3BN2"))
PRESETS = {
    "MXFP8_E4M3": MXFP8_E4M3,
    "MXFP8_E5M2": MXFP8_E5M2,
    "MXFP6_E2M3": MXFP6_E2M3,
    "MXFP6_E3M2": MXFP6_E3M2,
    "MXFP4": MXFP4,
    "MXINT8": MXINT8,
    "NVFP4": NVFP4,
    "NVFP4_INT4": NVFP4_INT4,
}
"""Block formats of OCP and NVIDIA, and our own, by name."""


def as_block_format(fmt: Any) -> BlockFormat:
    """Turn a block format or its name into the block format.

    Raises:
        TypeError: If it is neither.
        ValueError: If no preset has the name.
    """
    if isinstance(fmt, BlockFormat):
        return fmt
    if not isinstance(fmt, str):
        raise TypeError(f"fmt is {fmt!r}; it must be a BlockFormat, such as MXFP4, or a name")
    if fmt.upper() not in PRESETS:
        raise ValueError(f"fmt is {fmt!r}; block formats are {', '.join(PRESETS)}")
    return PRESETS[fmt.upper()]
