"""First and second moments of what a layer reads and should give, streamed over batches.

A layer is a matrix that multiplies columns: the features of a token for a linear layer, the
unfolded patch under the kernel for a convolution. An error e in a row of the matrix costs
`e E[x x^T] e^T` in the mean square of the output, x being a random column. Grouped convolutions
are one such matrix for each group, so everything here has a leading dimension of groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MAX_CHUNK = 2**24
"""Numbers unfolded at once."""


def as_columns(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the columns that a layer multiplies.

    Args:
        layer: A Conv1d or Conv2d, with any stride, dilation, groups and padding, or a Linear.
        x: Its input, shape (batch, channels, ...) or, for a Linear, (batch, ..., features).

    Returns:
        Shape (groups, columns, positions), positions in the order of the output's. Columns are in
        the order of `weight.flatten(1)`.

    Example:
        >>> as_columns(nn.Conv2d(4, 4, 3, groups=2), torch.zeros(5, 4, 6, 6)).shape
        torch.Size([2, 18, 80])
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1]).mT
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded: torch.Tensor = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):  # unfold knows images alone: these are of height 1
        padded = padded.unsqueeze(2)
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
    return _by_group(F.unfold(padded, kernel, dilation, stride=stride), layer.groups)


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Bring (batch, channels, positions) to (groups, channels of one, positions of all)."""
    split: torch.Tensor = x.unflatten(1, (groups, -1))
    return split.permute(1, 2, 0, 3).flatten(2)


def as_rows(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """Return a layer's output as matrix times columns, shape (groups, rows, positions)."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return y.reshape(1, -1, y.shape[-1]).mT
    return _by_group(y.flatten(2), layer.groups)


def as_matrix(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as the matrix that multiplies the columns, shape (groups, rows, columns)."""
    matrix: torch.Tensor = weight.flatten(1).unflatten(0, (getattr(layer, "groups", 1), -1))
    return matrix


class Moments:
    """Moments of columns x that a matrix reads and of rows y that it should give.

    Args:
        groups: Matrices side by side.
        rows: Rows of each.
        columns: Columns of each.
        options: Dtype and device, as for torch.zeros.

    Attributes:
        positions: Columns that were added.
    """

    def __init__(self, groups: int, rows: int, columns: int, **options: Any) -> None:
        self.positions = 0
        self._input = torch.zeros(groups, columns, **options)
        self._output = torch.zeros(groups, rows, **options)
        self._second = torch.zeros(groups, columns, columns, **options)
        self._cross = torch.zeros(groups, rows, columns, **options)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add columns (groups, columns, positions) and outputs (groups, rows, positions)."""
        self.positions += x.shape[-1]
        self._input += x.sum(dim=-1)
        self._output += y.sum(dim=-1)
        self._second += x @ x.mT
        self._cross += y @ x.mT

    @property
    def input_mean(self) -> torch.Tensor:
        """Mean of the columns, shape (groups, columns)."""
        return self._input / self.positions

    @property
    def output_mean(self) -> torch.Tensor:
        """Mean of the outputs, shape (groups, rows)."""
        return self._output / self.positions

    def second(self, *, centred: bool) -> torch.Tensor:
        """Return E[x x^T], or the covariance of x, shape (groups, columns, columns).

        The covariance is what errors cost where a bias makes up for their mean.
        """
        second = self._second / self.positions
        return second - _outer(self.input_mean, self.input_mean) if centred else second

    def cross(self, *, centred: bool) -> torch.Tensor:
        """Return E[y x^T], or the covariance of y and x, shape (groups, rows, columns)."""
        cross = self._cross / self.positions
        return cross - _outer(self.output_mean, self.input_mean) if centred else cross


def _outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[..., :, None] * b[..., None, :]


def layer_moments(
    layer: nn.Module,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    *,
    most: int | None = None,
    generator: torch.Generator | None = None,
) -> Moments:
    """Return the moments of a batch of a layer's inputs and wanted outputs, unfolded in chunks.

    Args:
        layer: A Conv1d, Conv2d or Linear, for its shapes.
        inputs: What it reads.
        outputs: What it should give, bias included.
        most: Positions to use at most, drawn evenly from all samples; None uses all.
        generator: Source of that draw.
    """
    matrix = as_matrix(layer, layer.get_parameter("weight"))
    moments = Moments(*matrix.shape, dtype=inputs.dtype, device=inputs.device)
    positions = outputs.numel() // matrix.shape[0] // matrix.shape[1] // len(outputs)
    kept = positions if most is None else min(positions, -(-most // len(outputs)))
    chunk = max(1, MAX_CHUNK // (positions * matrix.shape[0] * matrix.shape[2]))
    for x, y in zip(inputs.split(chunk), outputs.split(chunk), strict=True):
        read, given = as_columns(layer, x), as_rows(layer, y)
        if kept < positions:
            drawn = torch.randint(read.shape[-1], (kept * len(x),), generator=generator)
            read, given = (part[..., drawn.to(x.device)] for part in (read, given))
        moments.add(read, given)
    return moments
