"""What must be known of a quantized layer, beside its shape, to rebuild it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from fpformats import FloatFormat, parse
from msfp.errors import InputError
from msfp.quantizer import Quantizer

TENSOR, CHANNEL = "tensor", "channel"
"""The granularities of one scale, and of one for each channel."""


@dataclass(frozen=True)
class LayerFormats:
    """Formats and granularities of one layer.

    Attributes:
        weight: Format of the weights, which have a scale for each output channel.
        input: Format of the inputs, with a zero point if it is unsigned; None where inputs are
            left as they are.
        input_granularity: "tensor" where the inputs have one scale, "channel" where each of their
            channels has its own.
        branch_rank: Rank of the branch of full precision, 0 where there is none.

    Example:
        >>> formats = LayerFormats(parse("E2M1"), parse("E2M2U"))
        >>> formats.to_dict()["input_format"], formats.to_dict()["input_granularity"]
        ('E2M2U', 'tensor')
        >>> LayerFormats.from_dict(formats.to_dict()) == formats
        True
    """

    weight: FloatFormat
    input: FloatFormat | None = None
    input_granularity: str = TENSOR
    branch_rank: int = 0

    def __str__(self) -> str:
        parts = [f"weight={self.weight}"]
        if self.input is not None:
            parts.append(f"input={self.input}")
        if self.branch_rank:
            parts.append(f"branch_rank={self.branch_rank}")
        return ", ".join(parts)

    @classmethod
    def of(
        cls, weights: Quantizer, inputs: Quantizer | None, branch_up: torch.Tensor | None
    ) -> Self:
        """Return the formats of a layer with these quantizers, and this factor of its branch."""
        return cls(
            weights.format,
            None if inputs is None else inputs.format,
            CHANNEL if inputs is not None and inputs.scale.dim() else TENSOR,
            0 if branch_up is None else branch_up.shape[1],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the formats by name, as plain JSON types."""
        return {
            "weight_format": str(self.weight),
            "weight_granularity": CHANNEL,
            "input_format": None if self.input is None else str(self.input),
            "input_granularity": self.input_granularity,
            "branch_rank": self.branch_rank,
        }

    @classmethod
    def from_dict(cls, names: dict[str, Any]) -> Self:
        """Return the formats that `to_dict` named.

        Raises:
            InputError: If a key is missing or unknown, a format is not one of at most 8 bits, or
                a granularity or a rank is not one that there can be.
        """
        keys = {
            "weight_format", "weight_granularity", "input_format", "input_granularity",
            "branch_rank",
        }  # fmt: skip
        if not isinstance(names, dict) or set(names) != keys:
            raise InputError(f"it must have the keys {sorted(keys)}, not {names!r}")
        for key, allowed in (
            ("weight_granularity", (CHANNEL,)),
            ("input_granularity", (TENSOR, CHANNEL)),
        ):
            if names[key] not in allowed:
                known = " or ".join(map(repr, allowed))
                raise InputError(f"{key} must be {known}, not {names[key]!r}")
        rank = names["branch_rank"]
        if type(rank) is not int or rank < 0:
            raise InputError(f"branch_rank must be a whole number from 0 on, not {rank!r}")
        given = names["input_format"]
        return cls(
            narrow_format("weight_format", names["weight_format"]),
            None if given is None else narrow_format("input_format", given),
            names["input_granularity"],
            rank,
        )


def narrow_format(key: str, name: Any) -> FloatFormat:
    """Return the format of a name; raise InputError unless it is one of at most 8 bits."""
    try:
        fmt = parse(name)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{key} {name!r} is not a format: {error}") from error
    if fmt.bits > 8:
        raise InputError(f"{key} {name!r} has {fmt.bits} bits, more than 8")
    return fmt
