"""The quantized classes of each plain layer class, in one table."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from msfp.layers.block import BlockLayer
from msfp.layers.kinds import plain_class
from msfp.layers.scaled import ScaledLayer
from msfp.layers.trainable import TrainableLayer
from msfp.layers.trainable_block import TrainableBlockLayer


class QuantLinear(ScaledLayer, nn.Linear):  # type: ignore[override]
    """nn.Linear with packed weight and quantized input."""


class TrainableLinear(TrainableLayer, nn.Linear):
    """nn.Linear with quantized weight and input, to be trained."""

    packed_class = QuantLinear


class BlockLinear(BlockLayer, nn.Linear):  # type: ignore[override]
    """nn.Linear with packed weight and quantized input in blocks."""


class TrainableBlockLinear(TrainableBlockLayer, nn.Linear):
    """nn.Linear with quantized weight and input in blocks, to be refined."""

    block_class = BlockLinear


class QuantConv1d(ScaledLayer, nn.Conv1d):  # type: ignore[override]
    """nn.Conv1d with packed weight and quantized input."""


class TrainableConv1d(TrainableLayer, nn.Conv1d):
    """nn.Conv1d with quantized weight and input, to be trained."""

    packed_class = QuantConv1d


class BlockConv1d(BlockLayer, nn.Conv1d):  # type: ignore[override]
    """nn.Conv1d with packed weight and quantized input in blocks."""


class TrainableBlockConv1d(TrainableBlockLayer, nn.Conv1d):
    """nn.Conv1d with quantized weight and input in blocks, to be refined."""

    block_class = BlockConv1d


class QuantConv2d(ScaledLayer, nn.Conv2d):  # type: ignore[override]
    """nn.Conv2d with packed weight and quantized input."""


class TrainableConv2d(TrainableLayer, nn.Conv2d):
    """nn.Conv2d with quantized weight and input, to be trained."""

    packed_class = QuantConv2d


class BlockConv2d(BlockLayer, nn.Conv2d):  # type: ignore[override]
    """nn.Conv2d with packed weight and quantized input in blocks."""


class TrainableBlockConv2d(TrainableBlockLayer, nn.Conv2d):
    """nn.Conv2d with quantized weight and input in blocks, to be refined."""

    block_class = BlockConv2d


class QuantConv3d(ScaledLayer, nn.Conv3d):  # type: ignore[override]
    """nn.Conv3d with packed weight and quantized input."""


class TrainableConv3d(TrainableLayer, nn.Conv3d):
    """nn.Conv3d with quantized weight and input, to be trained."""

    packed_class = QuantConv3d


class BlockConv3d(BlockLayer, nn.Conv3d):  # type: ignore[override]
    """nn.Conv3d with packed weight and quantized input in blocks."""


class TrainableBlockConv3d(TrainableBlockLayer, nn.Conv3d):
    """nn.Conv3d with quantized weight and input in blocks, to be refined."""

    block_class = BlockConv3d


class Family(NamedTuple):
    """The quantized classes of a plain layer.

    Attributes:
        packed: Class with packed codes and one scale for each output channel.
        trainable: Class with the full-precision weight.
        block: Class with packed codes and one scale for each block.
        trainable_block: Class with the full-precision weight, and one scale for each block.
    """

    packed: type[ScaledLayer]
    trainable: type[TrainableLayer]
    block: type[BlockLayer]
    trainable_block: type[TrainableBlockLayer]


FAMILIES: dict[type[nn.Module], Family] = {
    nn.Linear: Family(QuantLinear, TrainableLinear, BlockLinear, TrainableBlockLinear),
    nn.Conv1d: Family(QuantConv1d, TrainableConv1d, BlockConv1d, TrainableBlockConv1d),
    nn.Conv2d: Family(QuantConv2d, TrainableConv2d, BlockConv2d, TrainableBlockConv2d),
    nn.Conv3d: Family(QuantConv3d, TrainableConv3d, BlockConv3d, TrainableBlockConv3d),
}
"""The quantized classes of each plain class in `kinds.KINDS`."""


def family_of(layer: nn.Module) -> Family:
    """Return the quantized classes that can replace a plain layer.

    Raises:
        InputError: If layers of this class cannot be quantized.

    Example:
        >>> family_of(nn.Conv2d(1, 1, 1)).packed.__name__
        'QuantConv2d'
    """
    return FAMILIES[plain_class(type(layer))]
