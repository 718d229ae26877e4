"""Quantized layers in block formats that have the full-precision weight and can be refined."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from msfp.layers.block import FLOAT_REASON, BlockLayer
from msfp.layers.block_quantizer import BlockQuantizer, quantize_input_blocks
from msfp.layers.formats import BlockFormats
from msfp.layers.trainable import TrainableLayer


class TrainableBlockLayer(TrainableLayer):
    """A layer that rounds its weight to blocks at each forward.

    `input_quantizer` is None: the scales of inputs are computed from each input.

    Attributes:
        weight_quantizer: Quantizer of the weight, with one scale for each block.
        input_blocks: Name of the block format of inputs, or None if they are not quantized.
        searches_inputs: Whether the scales of inputs are searched when the layer runs.
    """

    block_class: type[BlockLayer]
    input_blocks: str | None
    searches_inputs: bool = False

    @classmethod
    def of(cls, layer: nn.Module, weight: torch.Tensor, formats: BlockFormats) -> Self:
        """Return a trainable layer that shares the parameters of a plain one.

        Args:
            layer: The plain layer.
            weight: Its weight in float32.
            formats: The block formats.
        """
        trainable = cls.wrap(layer, BlockQuantizer.of(formats.weight, weight), None)
        trainable.input_blocks, trainable.searches_inputs = formats.input, formats.searches_inputs
        return trainable

    @property
    def block_quantizer(self) -> BlockQuantizer:
        """The quantizer of the weight."""
        if not isinstance(self.weight_quantizer, BlockQuantizer):
            raise TypeError("weight_quantizer must be a BlockQuantizer")
        return self.weight_quantizer

    @property
    def formats(self) -> BlockFormats:  # type: ignore[override]
        """Block formats of weight and inputs."""
        rank = 0 if self.branch_up is None else self.branch_up.shape[-1]
        name = self.block_quantizer.name
        return BlockFormats(name, self.input_blocks, rank, self.searches_inputs, self.rotation)

    @property
    def integer_grids(self) -> str:
        """The reason why the operands are not whole numbers times one step."""
        return FLOAT_REASON

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded with one scale for each block of channels; same shape, dtype."""
        blocks, axis = self.formats.input_blocks, self.kind.channel_axis(x)
        if blocks is None:
            return x
        return quantize_input_blocks(x, blocks, axis, searched=self.searches_inputs)

    @torch.no_grad()
    def pack(self) -> BlockLayer:
        """Return a packed layer with the same outputs."""
        return self.block_class.of_quantizer(self, self.weight, self.block_quantizer, self.formats)
