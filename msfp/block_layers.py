"""Layers whose weight and input are rounded to block formats, MX and NVFP4, to compare with.

They can be run and no more: they are not trained, sealed or saved.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from fpformats import quantize_blocks
from fpformats.blocks import MXFP4, MXFP6_E2M3, MXFP8_E4M3, NVFP4, BlockFormat
from msfp.denoiser import PlainLayer
from msfp.errors import InputError
from msfp.layers import adopt

BLOCK_FORMATS: dict[str, dict[int, tuple[str, BlockFormat]]] = {
    "mx": {
        4: ("MXFP4", MXFP4),
        6: ("MXFP6_E2M3", MXFP6_E2M3),
        8: ("MXFP8_E4M3", MXFP8_E4M3),
    },
    "nvfp4": {4: ("NVFP4", NVFP4), 8: ("MXFP8_E4M3", MXFP8_E4M3)},
}
"""Name and format by scheme and bits."""


class BlockLayer(nn.Module):
    """What block layers share; mixed in before the nn class.

    Attributes:
        weight: The rounded weight; its blocks lie along the input channels.
        weight_format: What the format of the weight is called.
        input_format: That of the input, or None to leave it as it is.
    """

    weight: torch.Tensor
    weight_format: str
    input_format: str | None
    _input_blocks: BlockFormat | None
    _input_axis: int

    @classmethod
    @torch.no_grad()
    def of(cls, layer: PlainLayer, scheme: str, weights: int, activations: int | None) -> Self:
        """Return a block layer with the attributes and the bias of a plain one.

        Args:
            layer: A plain layer.
            scheme: A key of `BLOCK_FORMATS`.
            weights: Bits of the weight.
            activations: Bits of the input, or None.
        """
        blocks = adopt(cls, layer)
        blocks._parameters = dict(layer._parameters)
        blocks.weight_format, fmt = BLOCK_FORMATS[scheme][weights]
        blocks.weight = nn.Parameter(quantize_blocks(layer.weight, fmt, axis=1), False)
        blocks.input_format, blocks._input_blocks = None, None
        if activations is not None:
            blocks.input_format, blocks._input_blocks = BLOCK_FORMATS[scheme][activations]
        blocks._input_axis = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
        return blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round the input, each block to its own scale, and apply the layer."""
        if self._input_blocks is not None:
            x = quantize_blocks(x, self._input_blocks, self._input_axis)
        y: torch.Tensor = super().forward(x)
        return y

    def extra_repr(self) -> str:
        """Return what repr shows."""
        return f"{super().extra_repr()}, weight={self.weight_format}, input={self.input_format}"


class BlockLinear(BlockLayer, nn.Linear):
    """nn.Linear with weight and input in blocks."""


class BlockConv1d(BlockLayer, nn.Conv1d):
    """nn.Conv1d with weight and input in blocks."""


class BlockConv2d(BlockLayer, nn.Conv2d):
    """nn.Conv2d with weight and input in blocks."""


BLOCK_LAYERS: dict[type[nn.Module], type[BlockLayer]] = {
    nn.Linear: BlockLinear,
    nn.Conv1d: BlockConv1d,
    nn.Conv2d: BlockConv2d,
}
"""The counterpart of each plain layer."""


def block_layers(denoiser: nn.Module) -> dict[str, BlockLayer]:
    """Return the block layers of a denoiser by name, in definition order."""
    return {
        name: module for name, module in denoiser.named_modules() if isinstance(module, BlockLayer)
    }


def refuse_block_layers(denoiser: nn.Module) -> None:
    """Raise InputError if a denoiser has block layers, which can be run and no more."""
    for name, layer in block_layers(denoiser).items():
        raise InputError(
            f"layer {name!r} is in {layer.weight_format}: block formats can be run and compared "
            "with, but not yet be fine-tuned, sealed or saved"
        )
