"""Moments of a layer's inputs and wanted outputs, and the corrections computed from them.

A layer is a matrix that multiplies columns. A column holds the features of a token for a linear
layer, and the unfolded patch under the kernel for a convolution. An error e in a row of the matrix
causes a mean squared error of `e E[x x^T] e^T` in the output, where x is a random column. A grouped
convolution has one such matrix for each group, so all tensors here have a leading dimension of
groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
        self._second.baddbmm_(x, x.mT)
        self._cross.baddbmm_(y, x.mT)

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
        return self._averaged(self._second.clone(), self.input_mean, centred)

    def take_second(self, *, centred: bool) -> torch.Tensor:
        """Return what `second` returns and forget it, because it may be large."""
        second, self._second = self._second, self._second.new_empty(0)
        return self._averaged(second, self.input_mean, centred)

    def cross(self, *, centred: bool) -> torch.Tensor:
        """Return E[y x^T], or the covariance of y and x, shape (groups, rows, columns)."""
        return self._averaged(self._cross.clone(), self.output_mean, centred)

    def residual(self, matrix: torch.Tensor, *, centred: bool) -> torch.Tensor:
        """Return E[(y - M x) x^T], or the covariance, shape (groups, rows, columns).

        Args:
            matrix: M, shape (groups, rows, columns).
            centred: Whether a bias corrects the means.
        """
        mean = self.output_mean - (matrix @ self.input_mean[..., None])[..., 0]
        return self._averaged(self._cross - matrix @ self._second, mean, centred)

    def _averaged(self, sums: torch.Tensor, mean: torch.Tensor, centred: bool) -> torch.Tensor:
        """Divide sums of products with x by their number, and subtract that of the means."""
        sums.div_(self.positions)
        if centred:
            sums.baddbmm_(mean[..., :, None], self.input_mean[..., None, :], alpha=-1)
        return sums


Column = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""What becomes of columns (groups, columns, positions) and outputs (groups, rows, positions)."""


def layer_moments(
    layer: nn.Module,
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]],
    rows: int,
    *,
    select: Column | None = None,
    most: int | None = None,
    generator: torch.Generator | None = None,
) -> Moments:
    """Return the moments of a layer's inputs and wanted outputs, unfolded in chunks.

    Args:
        layer: The layer, for its shapes.
        parts: Its inputs and its wanted outputs, in batches; there is at least one.
        rows: Number of samples in all batches.
        select: Applied to the columns and outputs before they are added.
        most: Largest number of positions to use, drawn evenly from all samples; None uses all.
        generator: Random generator for that draw.
    """
    kind, matrix = kind_of(layer), as_matrix(layer, layer.get_parameter("weight"))
    found: list[Moments] = []
    for inputs, outputs in parts:
        positions = outputs.numel() // matrix.shape[0] // matrix.shape[1] // len(outputs)
        kept = positions if most is None else min(positions, -(-most // rows))
        chunk = max(1, MAX_CHUNK // (positions * matrix.shape[0] * matrix.shape[2]))
        for x, y in zip(inputs.split(chunk), outputs.split(chunk), strict=True):
            read, given = kind.columns(layer, x), kind.rows(layer, y)
            if kept < positions:
                drawn = torch.randint(read.shape[-1], (kept * len(x),), generator=generator)
                read, given = (part[..., drawn.to(x.device)] for part in (read, given))
            if select is not None:
                read, given = select(read, given)
            if not found:
                sizes = len(read), given.shape[1], read.shape[1]
                found.append(Moments(*sizes, dtype=read.dtype, device=read.device))
            found[0].add(read, given)
    return found[0]


def matched_matrix(
    matrix: torch.Tensor, residual: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """Return the matrix that computes the wanted outputs best from the quantized inputs.

    With moments damped by d, the result M minimises the mean square of `y - M x`, plus d times the
    squared distance from the given matrix. M corrects the errors of the inputs as far as they can
    be predicted from the quantized inputs. Without such errors, M is the given matrix.

    Args:
        matrix: The full-precision weights, shape (groups, rows, columns).
        residual: `Moments.residual` of the matrix, for the quantized inputs x and the wanted
            outputs y. If centred, this is ordinary least squares with an intercept.
        upper: The `upper_factor` of the damped second moments of x.

    Returns:
        Shape (groups, rows, columns).
    """
    half = torch.linalg.solve_triangular(upper.mT, residual, upper=False, left=False)
    change: torch.Tensor = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    return matrix + change


def matched_bias(
    matrix: torch.Tensor, input_mean: torch.Tensor, output_mean: torch.Tensor
) -> torch.Tensor:
    """Return the bias that gives the output its wanted mean, shape (groups * rows,).

    Args:
        matrix: The quantized weights, shape (groups, rows, columns).
        input_mean: Mean of the quantized columns, shape (groups, columns).
        output_mean: Mean of the wanted outputs, bias included, shape (groups, rows).
    """
    mean = (matrix @ input_mean[..., None])[..., 0]
    return (output_mean - mean).flatten()
