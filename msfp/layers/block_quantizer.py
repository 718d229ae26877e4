"""Rounding to block formats: a weight with scales that were found for it, and any input."""

from __future__ import annotations

from typing import Self

import torch

from fpformats import FloatFormat, encode_blocks, quantize_blocks
from fpformats.fitting.block_scales import search_scales
from fpformats.ops.block_formats import PRESETS, BlockFormat
from fpformats.ops.block_scaling import scale_values
from msfp.layers.fake_quantizer import Quantizer

WEIGHT_AXIS = 1
"""The axis of a weight along which blocks are formed: the input channels."""
PART = 2**22
"""Weights whose scales are searched at once."""
LARGEST = torch.finfo(torch.float32).max


class BlockQuantizer(Quantizer):
    """Rounds a weight to a block format. The scales of the blocks stay when the weight changes.

    Args:
        name: Name of the block format in `fpformats`.
        codes: Codes of the scales, uint8, with blocks in place of the input channels of the weight;
            none stands for zero.
        tensor_scale: The float32 scale of the whole weight, shape (), or None if the format has
            none.

    Attributes:
        scale: The scales as numbers, float32, shape of `codes`.
        chosen: Which blocks have the alternative format, shape of `codes`, or None if there is
            none.
    """

    codes: torch.Tensor
    chosen: torch.Tensor | None
    tensor_scale: torch.Tensor | None

    def __init__(self, name: str, codes: torch.Tensor, tensor_scale: torch.Tensor | None) -> None:
        blocks = PRESETS[name]
        scale, chosen = scale_values(codes, blocks, "float32")
        super().__init__(blocks.element, scale if tensor_scale is None else scale * tensor_scale)
        self.name = name
        self.register_buffer("codes", codes)
        self.register_buffer("chosen", chosen)
        self.register_buffer("tensor_scale", tensor_scale)

    @classmethod
    def of(cls, name: str, weight: torch.Tensor) -> Self:
        """Return the quantizer whose scales have the least squared error of a finite weight."""
        blocks = PRESETS[name]
        whole = tensor_scale(weight, blocks) if blocks.tensor_scale else None
        rows = max(1, PART // max(1, weight[0].numel()))
        found = [
            search_scales(part, blocks, axis=WEIGHT_AXIS, tensor_scale=whole)[0]
            for part in weight.detach().float().split(rows)
        ]
        # A block of zeros may have any scale, and rounding divides by it.
        codes = torch.cat(found).clamp(min=blocks.scale.smallest_code)
        return cls(name, codes, whole)

    @property
    def blocks(self) -> BlockFormat:
        """The block format."""
        return PRESETS[self.name]

    @property
    def alternative(self) -> FloatFormat | None:
        """The second format of elements, or None."""
        return self.blocks.alternative

    def scales_of(self, shape: torch.Size) -> torch.Tensor:
        """Return the scale of each number of a weight of a shape."""
        return self._spread(self.scale, shape)

    def chosen_of(self, shape: torch.Size) -> torch.Tensor | None:
        """Return which weights have the alternative format; None if there is none."""
        return None if self.chosen is None else self._spread(self.chosen, shape)

    def _spread(self, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return values of blocks for each weight."""
        index = torch.arange(shape[WEIGHT_AXIS], device=values.device) // self.blocks.size
        return values.index_select(WEIGHT_AXIS, index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a weight rounded, same shape and dtype."""
        rounded: torch.Tensor = quantize_blocks(
            x, self.blocks, axis=WEIGHT_AXIS, scales=self.codes, tensor_scale=self.tensor_scale
        )
        return rounded + 0.0 if self.blocks.twos_complement else rounded  # integers have one zero

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the codes of a weight's elements, uint8, same shape."""
        codes: torch.Tensor = encode_blocks(
            weight, self.blocks, axis=WEIGHT_AXIS, scales=self.codes, tensor_scale=self.tensor_scale
        ).codes
        return codes

    def extra_repr(self) -> str:
        """Return the description in `repr`."""
        return f"{self.name}, scale {tuple(self.scale.shape)}"


def quantize_input_blocks(
    x: torch.Tensor, blocks: BlockFormat, axis: int, *, searched: bool = False
) -> torch.Tensor:
    """Return an input rounded with one scale for each block of channels; same shape, dtype.

    A format with a scale of the whole tensor has one of each sample, so that samples do not depend
    on the others of their batch.

    Args:
        x: The input, samples first.
        blocks: The block format.
        axis: The axis of the channels.
        searched: Whether the scales are searched, for less error than those of the rule have.
    """
    whole = None
    if blocks.tensor_scale and x.numel():
        whole = tensor_scale(x, blocks, tuple(range(1, x.dim())) if x.dim() > 1 else (0,))
    scales = None
    if searched:
        scales, whole = search_scales(x.detach(), blocks, axis=axis, tensor_scale=whole)
    rounded: torch.Tensor = quantize_blocks(x, blocks, axis=axis, scales=scales, tensor_scale=whole)
    return rounded


def tensor_scale(
    x: torch.Tensor, blocks: BlockFormat, dims: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Return the scale that maps the largest magnitude to the largest element and block scale.

    Args:
        x: A weight or an input.
        blocks: The block format.
        dims: The dimensions that share a scale and have length 1 in the result. None shares one,
            of shape (), among all.
    """
    largest = x.detach().abs()
    largest = largest.amax() if dims is None else largest.amax(dims, keepdim=True)
    # NaN affects its own block alone, and products with a scale must be finite.
    largest = largest.double().nan_to_num(0.0, posinf=LARGEST)
    scale = largest / (blocks.largest_element * blocks.scale.max)
    scale = scale.clamp(max=LARGEST / blocks.scale.max).float()
    return torch.where(scale == 0, 1.0, scale)
