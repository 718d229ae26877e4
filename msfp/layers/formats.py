"""Number formats of a quantized layer: with its shape, all that is needed to rebuild it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from fpformats import FloatFormat, parse
from fpformats.ops.block_formats import PRESETS, BlockFormat
from msfp.errors import InputError
from msfp.layers.branch_factor import INPUT_FORMAT
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.kinds import groups_of
from msfp.support.checks import check_choice

TENSOR, CHANNEL, TOKEN, BLOCK = "tensor", "channel", "token", "block"
"""Granularities: one scale for the tensor, for each channel, for each token, for each block."""
KEYS = {
    "weight_format", "weight_granularity", "input_format", "input_granularity", "branch_rank",
}  # fmt: skip
"""Keys of a layer in a checkpoint's config."""
BRANCH_ADAPTERS = "branch_adapters"
"""An additional key of layers with several low-rank branches."""
BRANCH_INPUT = "branch_input_format"
"""An additional key of layers with a low-rank branch in 8 bits."""
INPUT_SCALES, SEARCHED = "input_scales", "searched"
"""An additional key of layers that search the scales of their inputs' blocks, and its value."""
INPUT_ROTATION = "input_rotation"
"""An additional key of layers that rotate their input."""
ROTATIONS = (16, 64, 256)
"""Sizes of the groups of input channels that are rotated: the transform is then exactly scaled."""


@dataclass(frozen=True)
class LayerFormats:
    """Formats and granularities of a layer with one scale for each output channel.

    Attributes:
        weight: Format of the weights, which have one scale for each output channel.
        input: Format of the inputs, with a zero point if it is unsigned. None if inputs are not
            quantized.
        input_granularity: "tensor" for one scale of the inputs, "channel" for one scale of each
            input channel, "token" for one scale of each token, which is computed from the token.
        branch_rank: Rank of the low-rank branch, 0 for no branch.
        branch_adapters: Number of low-rank branches, of which the routing chooses one.
        branch_input: Format of the input of the low-rank branch, whose first factor is then rounded
            to 8 bits too. None for a branch in full precision.
        rotation: Number of adjacent input channels that are rotated together, or 1.

    Example:
        >>> formats = LayerFormats(parse("E2M1"), parse("E2M2U"))
        >>> formats.to_dict()["input_format"], formats.to_dict()["input_granularity"]
        ('E2M2U', 'tensor')
        >>> read_formats(formats.to_dict()) == formats
        True
    """

    weight: FloatFormat
    input: FloatFormat | None = None
    input_granularity: str = TENSOR
    branch_rank: int = 0
    branch_adapters: int = 1
    branch_input: FloatFormat | None = None
    rotation: int = 1

    @property
    def bits(self) -> int:
        """Bits of a weight's code."""
        return self.weight.bits

    def __str__(self) -> str:
        parts = [f"weight={self.weight}"]
        if self.input is not None:
            parts.append(f"input={self.input}")
        if self.branch_rank:
            parts.append(f"branch_rank={self.branch_rank}")
        if self.branch_adapters > 1:
            parts.append(f"branch_adapters={self.branch_adapters}")
        if self.branch_input is not None:
            parts.append(f"branch_input={self.branch_input}")
        if self.rotation > 1:
            parts.append(f"rotation={self.rotation}")
        return ", ".join(parts)

    @classmethod
    def of(
        cls,
        weights: Quantizer,
        inputs: Quantizer | None,
        branch_up: torch.Tensor | None,
        branch_inputs: Quantizer | None = None,
        rotation: int = 1,
    ) -> Self:
        """Return the formats of a layer from its quantizers and a factor of its low-rank branch."""
        return cls(
            weights.format,
            None if inputs is None else inputs.format,
            _granularity(inputs),
            0 if branch_up is None else branch_up.shape[-1],
            len(branch_up) if branch_up is not None and branch_up.dim() > 2 else 1,
            None if branch_inputs is None else branch_inputs.format,
            rotation,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the formats by name, as plain JSON types."""
        several = {BRANCH_ADAPTERS: self.branch_adapters} if self.branch_adapters > 1 else {}
        narrow = {} if self.branch_input is None else {BRANCH_INPUT: str(self.branch_input)}
        return {
            "weight_format": str(self.weight),
            "weight_granularity": CHANNEL,
            "input_format": None if self.input is None else str(self.input),
            "input_granularity": self.input_granularity,
            "branch_rank": self.branch_rank,
            **several,
            **narrow,
            **_rotation(self.rotation),
        }


@dataclass(frozen=True)
class BlockFormats:
    """Formats of a layer with one scale for each block of its weight and inputs.

    Attributes:
        weight: Name of the weight's block format in `fpformats`.
        input: Name of the inputs' block format, or None if inputs are not quantized.
        branch_rank: Rank of the low-rank branch, which is in full precision; 0 for no branch.
        searches_inputs: Whether the scales of the inputs' blocks are searched when the layer runs,
            for less error than those of the format's rule have.
        rotation: Number of adjacent input channels that are rotated together, or 1.

    Example:
        >>> formats = BlockFormats("NVFP4", "MXFP8_E4M3")
        >>> formats.weight_blocks.size, formats.bits
        (16, 4)
        >>> read_formats(formats.to_dict()) == formats
        True
    """

    weight: str
    input: str | None = None
    branch_rank: int = 0
    searches_inputs: bool = False
    rotation: int = 1

    @property
    def weight_blocks(self) -> BlockFormat:
        """The format of the weight."""
        return PRESETS[self.weight]

    @property
    def input_blocks(self) -> BlockFormat | None:
        """The format of the inputs, or None."""
        return None if self.input is None else PRESETS[self.input]

    @property
    def bits(self) -> int:
        """Bits of a weight's code."""
        return self.weight_blocks.element.bits

    def __str__(self) -> str:
        parts = [f"weight={self.weight}"]
        if self.input is not None:
            parts.append(f"input={self.input}")
        if self.searches_inputs:
            parts.append("input scales searched")
        if self.branch_rank:
            parts.append(f"branch_rank={self.branch_rank}")
        if self.rotation > 1:
            parts.append(f"rotation={self.rotation}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the formats by name, as plain JSON types."""
        searched = {INPUT_SCALES: SEARCHED} if self.searches_inputs else {}
        return {
            **searched,
            "weight_format": self.weight,
            "weight_granularity": BLOCK,
            "input_format": self.input,
            "input_granularity": BLOCK,
            "branch_rank": self.branch_rank,
            **_rotation(self.rotation),
        }


def _rotation(size: int) -> dict[str, int]:
    """Return the key of a rotation, if there is one."""
    return {INPUT_ROTATION: size} if size > 1 else {}


def _granularity(inputs: Quantizer | None) -> str:
    """Return which inputs share a scale."""
    if inputs is not None and inputs.by_token:
        return TOKEN
    return CHANNEL if inputs is not None and inputs.scale.dim() else TENSOR


def read_formats(names: Any) -> LayerFormats | BlockFormats:
    """Return the formats from the result of `to_dict`.

    Raises:
        InputError: If a key is missing or unknown, a format is unknown or has more than 8 bits, or
            a granularity, a rank or a number of low-rank branches is invalid.
    """
    more = {BRANCH_ADAPTERS, BRANCH_INPUT, INPUT_SCALES, INPUT_ROTATION}
    if not isinstance(names, dict) or set(names) - more != KEYS:
        raise InputError(f"it must have the keys {sorted(KEYS)}, not {names!r}")
    check_choice("weight_granularity", names["weight_granularity"], (CHANNEL, BLOCK))
    rank = names["branch_rank"]
    if type(rank) is not int or rank < 0:
        raise InputError(f"branch_rank must be a whole number from 0 on, not {rank!r}")
    adapters = names.get(BRANCH_ADAPTERS)
    if adapters is not None and (type(adapters) is not int or adapters < 2 or not rank):
        raise InputError(
            f"{BRANCH_ADAPTERS} must be a whole number from 2 on where branch_rank is above 0, and "
            f"absent elsewhere, not {adapters!r}"
        )
    if BRANCH_INPUT in names:
        check_choice(BRANCH_INPUT, names[BRANCH_INPUT], (str(INPUT_FORMAT),) if rank else ())
    if INPUT_ROTATION in names:
        check_choice(INPUT_ROTATION, names[INPUT_ROTATION], ROTATIONS)
    in_blocks = names["weight_granularity"] == BLOCK
    allowed = (BLOCK,) if in_blocks else (TENSOR, CHANNEL, TOKEN)
    check_choice("input_granularity", names["input_granularity"], allowed)
    return _block_formats(names) if in_blocks else _layer_formats(names)


def _layer_formats(names: dict[str, Any]) -> LayerFormats:
    if INPUT_SCALES in names:
        raise InputError(f"{INPUT_SCALES} is of layers in block formats alone")
    given = names["input_format"]
    return LayerFormats(
        narrow_format("weight_format", names["weight_format"]),
        None if given is None else narrow_format("input_format", given),
        names["input_granularity"],
        names["branch_rank"],
        names.get(BRANCH_ADAPTERS) or 1,
        INPUT_FORMAT if BRANCH_INPUT in names else None,
        names.get(INPUT_ROTATION, 1),
    )


def _block_formats(names: dict[str, Any]) -> BlockFormats:
    for key in (BRANCH_ADAPTERS, BRANCH_INPUT):
        if key in names:
            raise InputError(f"{key} must be absent in block formats, not {names[key]!r}")
    check_choice("weight_format", names["weight_format"], PRESETS)
    check_choice("input_format", names["input_format"], (*PRESETS, None))
    if INPUT_SCALES in names:
        allowed = () if names["input_format"] is None else (SEARCHED,)
        check_choice(INPUT_SCALES, names[INPUT_SCALES], allowed)
    searched = INPUT_SCALES in names
    return BlockFormats(
        names["weight_format"],
        names["input_format"],
        names["branch_rank"],
        searched,
        names.get(INPUT_ROTATION, 1),
    )


def can_rotate(layer: nn.Module, size: int) -> bool:
    """Return whether groups of a size divide the input channels of a layer without groups."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return size in ROTATIONS and groups_of(layer) == 1 and weight.shape[1] % size == 0


def narrow_format(key: str, name: Any) -> FloatFormat:
    """Return the format with a name; raise InputError if it is unknown or has more than 8 bits."""
    try:
        fmt = parse(name)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{key} {name!r} is not a format: {error}") from error
    if fmt.bits > 8:
        raise InputError(f"{key} {name!r} has {fmt.bits} bits, more than 8")
    return fmt
