"""Moments of a layer's inputs and wanted outputs, and the corrections computed from them.

A layer is a matrix that multiplies columns. A column holds the features of a token for a linear
layer, and the unfolded patch under the kernel for a convolution. An error e in a row of the matrix
causes a mean squared error of `e E[x x^T] e^T` in the output, where x is a random column. A grouped
convolution has one such matrix for each group, so all tensors here have a leading dimension of
groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from msfp.layers.kinds import groups_of, kind_of

MAX_CHUNK = 2**24
"""The most numbers that are unfolded at once."""


def as_matrix(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as the matrix that multiplies the columns, shape (groups, rows, columns)."""
    matrix: torch.Tensor = weight.flatten(1).unflatten(0, (groups_of(layer), -1))
    return matrix


class Moments:
    """Moments of the columns x that a matrix multiplies, and of its wanted outputs y.

    Args:
        groups: Number of matrices.
        rows: Rows of each matrix.
        columns: Columns of each matrix.
        options: Dtype and device, as for torch.zeros.

    Attributes:
        positions: Number of columns x added so far.
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

        The covariance gives the cost of errors if a bias corrects their mean.
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
        layer: The layer, for its shapes.
        inputs: Its inputs.
        outputs: Its wanted outputs, bias included.
        most: Largest number of positions to use, drawn evenly from all samples; None uses all.
        generator: Random generator for that draw.
    """
    kind, matrix = kind_of(layer), as_matrix(layer, layer.get_parameter("weight"))
    moments = Moments(*matrix.shape, dtype=inputs.dtype, device=inputs.device)
    positions = outputs.numel() // matrix.shape[0] // matrix.shape[1] // len(outputs)
    kept = positions if most is None else min(positions, -(-most // len(outputs)))
    chunk = max(1, MAX_CHUNK // (positions * matrix.shape[0] * matrix.shape[2]))
    for x, y in zip(inputs.split(chunk), outputs.split(chunk), strict=True):
        read, given = kind.columns(layer, x), kind.rows(layer, y)
        if kept < positions:
            drawn = torch.randint(read.shape[-1], (kept * len(x),), generator=generator)
            read, given = (part[..., drawn.to(x.device)] for part in (read, given))
        moments.add(read, given)
    return moments


def matched_matrix(
    matrix: torch.Tensor, moments: Moments, upper: torch.Tensor, *, centred: bool
) -> torch.Tensor:
    """Return the matrix that computes the wanted outputs best from the quantized inputs.

    With moments damped by d, the result M minimises the mean square of `y - M x`, plus d times the
    squared distance from the given matrix. M corrects the errors of the inputs as far as they can
    be predicted from the quantized inputs. Without such errors, M is the given matrix.

    Args:
        matrix: The full-precision weights, shape (groups, rows, columns).
        moments: Moments of the quantized inputs x and the full-precision outputs y.
        upper: The `upper_factor` of the damped second moments of x.
        centred: Whether a bias corrects the means (ordinary least squares with intercept).

    Returns:
        Shape (groups, rows, columns).
    """
    second = moments.second(centred=centred)
    residual = moments.cross(centred=centred) - matrix @ second
    half = torch.linalg.solve_triangular(upper.mT, residual, upper=False, left=False)
    change: torch.Tensor = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    return matrix + change


def matched_bias(matrix: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Return the bias that gives the output its wanted mean, shape (groups * rows,).

    Args:
        matrix: The quantized weights, shape (groups, rows, columns).
        moments: Moments of the quantized inputs and the full-precision outputs, bias included.
    """
    mean = (matrix @ moments.input_mean[..., None])[..., 0]
    return (moments.output_mean - mean).flatten()
