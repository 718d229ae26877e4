"""How many bytes a quantized layer has in its file."""

from __future__ import annotations

from msfp.layers.kinds import PlainLayer

FACTOR, SCALE = 2, 4
"""Bytes of a number of a low-rank branch, and of a scale."""


def layer_bytes(layer: PlainLayer, bits: int, rank: int) -> int:
    """Return the bytes of a quantized layer: codes, scales and low-rank branch.

    Bias and scales of inputs are not counted.

    Args:
        layer: The plain layer.
        bits: Bits of its weights.
        rank: Rank of its branch; 0 for none.

    Example:
        >>> from torch import nn
        >>> layer_bytes(nn.Linear(64, 32), bits=4, rank=2)
        1536
    """
    rows, columns = layer.weight.flatten(1).shape
    codes = -(-layer.weight.numel() * bits // 8)
    return codes + SCALE * rows + FACTOR * rank * (rows + columns)
