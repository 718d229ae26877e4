"""Packed layers with weight and input in block formats, MX and NVFP4."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import nn

from fpformats import Blocks, decode_blocks, encode_blocks, pack, unpack
from msfp.errors import InputError
from msfp.layers.base import quantized_layers
from msfp.layers.block_quantizer import WEIGHT_AXIS, BlockQuantizer, quantize_input_blocks
from msfp.layers.formats import BlockFormats
from msfp.layers.packed import PackedLayer, add_empty_branch, from_bits, packed_layers, to_bits

FLOAT_REASON = "block formats have a scale for each block"
"""Why integer units do not compute these layers."""


class BlockLayer(PackedLayer):
    """A packed layer with a scale for each block of input channels.

    Attributes:
        weight_scale: Codes of the scales of the weight's blocks, uint8. The shape is that of the
            weight, with blocks instead of input channels.
        tensor_scale: Bits of the float32 scale of the whole weight, int32, shape (), or None if the
            format has no such scale.
    """

    formats: BlockFormats | None = None
    weight_scale: torch.Tensor
    tensor_scale: torch.Tensor | None

    @classmethod
    def empty_like(cls, layer: nn.Module, formats: BlockFormats) -> Self:
        """Return a layer with another's attributes and bias, and with codes and scales of 0."""
        packed = cls._with_codes(layer, formats)
        fmt, device = formats.weight_blocks, packed.codes.device
        shape = list(packed.weight_shape)
        shape[WEIGHT_AXIS] = -(-shape[WEIGHT_AXIS] // fmt.size)
        scale = torch.zeros(shape, dtype=torch.uint8, device=device)
        packed.register_buffer("weight_scale", scale)
        bits = torch.zeros((), dtype=torch.int32, device=device)
        packed.register_buffer("tensor_scale", bits if fmt.tensor_scale else None)
        add_empty_branch(packed, formats.branch_rank)
        return packed

    @classmethod
    @torch.no_grad()
    def of_weight(cls, layer: nn.Module, weight: torch.Tensor, formats: BlockFormats) -> Self:
        """Return a layer with another's attributes and bias, and with a packed weight."""
        packed = cls.empty_like(layer, formats)
        packed._set_blocks(encode_blocks(weight, formats.weight_blocks, axis=WEIGHT_AXIS))
        return packed

    @classmethod
    @torch.no_grad()
    def of_quantizer(
        cls,
        layer: nn.Module,
        weight: torch.Tensor,
        quantizer: BlockQuantizer,
        formats: BlockFormats,
    ) -> Self:
        """Return a layer with another's attributes, bias and branch, and with a packed weight."""
        down, up = (layer._parameters.get(name) for name in ("branch_down", "branch_up"))
        packed = cls.empty_like(layer, formats)
        packed.branch_down, packed.branch_up = down, up
        codes = quantizer.encode(weight)
        packed._set_blocks(Blocks(codes, quantizer.codes.clone(), quantizer.tensor_scale))
        return packed

    def _set_blocks(self, blocks: Blocks) -> None:
        """Set the codes and scales of the weight."""
        if self.formats is None:
            raise ValueError("the layer has no formats yet")
        self.codes = nn.Parameter(pack(blocks.codes, self.formats.bits), requires_grad=False)
        self.weight_scale = blocks.scales
        if blocks.tensor_scale is not None:
            self.tensor_scale = to_bits(blocks.tensor_scale)

    def remove_branch(self) -> None:
        """Remove the low-rank branch, if there is one."""
        if self.formats is not None:
            self.formats = replace(self.formats, branch_rank=0)
            self.branch_down = self.branch_up = None

    @property
    def integer_grids(self) -> str:
        """The reason why the operands are not whole numbers times one step."""
        return FLOAT_REASON

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded with one scale for each block of channels; same shape, dtype."""
        if self.formats is None or self.formats.input_blocks is None:
            return x
        blocks, axis = self.formats.input_blocks, self.kind.channel_axis(x)
        return quantize_input_blocks(x, blocks, axis, searched=self.formats.searches_inputs)

    def decoded_weight(self, adapter: int, dtype: str) -> torch.Tensor:
        """Return the dequantized weight; block layers have one adapter, so `adapter` is ignored."""
        if self.formats is None:
            raise ValueError("the layer has no formats yet")
        del adapter
        codes = unpack(self.codes, self.formats.bits, shape=tuple(self.weight_shape))
        whole = None if self.tensor_scale is None else from_bits(self.tensor_scale)
        blocks = Blocks(codes, self.weight_scale, whole)
        weight: torch.Tensor = decode_blocks(
            blocks, self.formats.weight_blocks, axis=WEIGHT_AXIS, dtype=dtype
        )
        return weight


def block_layers(denoiser: nn.Module) -> dict[str, BlockLayer]:
    """Return the block layers of a denoiser by name, in definition order."""
    layers = packed_layers(denoiser)
    return {name: layer for name, layer in layers.items() if isinstance(layer, BlockLayer)}


def refuse_block_layers(denoiser: nn.Module) -> None:
    """Raise InputError if a denoiser has block layers, which cannot be fine-tuned."""
    for name, layer in quantized_layers(denoiser).items():
        if isinstance(layer.formats, BlockFormats):
            raise InputError(
                f"layer {name!r} cannot be fine-tuned: {layer.formats} are block formats"
            )
