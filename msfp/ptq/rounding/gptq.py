"""GPTQ on a floating-point grid: rounding that preserves a matrix's output, not its weights.

Columns are rounded one after the other. Each column compensates the output errors of the columns
before it (Frantar et al., ICLR 2023).

With H = E[x x^T] the error of a row is `e H e^T`. Let `H = R D R^T`, with R unit upper triangular.
The error is then the sum over columns of `D_j (e R)_j ** 2`. Its j-th term is least if the value
that is rounded is `w_j + sum_{k<j} e_k R_kj`. This needs one Cholesky factor and no inverse (Chee
et al., NeurIPS 2023, theorem 6).
"""

from __future__ import annotations

import torch

from msfp.ptq.rounding.weight_grid import WeightGrid

BLOCK = 64
"""Columns in a block; a matrix product applies the errors of all earlier blocks to a block."""


def damped(second: torch.Tensor, damping: float) -> torch.Tensor:
    """Return second moments with a fraction of their mean diagonal added to the diagonal.

    Args:
        second: Shape (groups, columns, columns).
        damping: The fraction. If the mean is 0, the diagonal becomes 1.
    """
    second = second.clone()
    damp_(second, second.diagonal(dim1=-2, dim2=-1).clone(), damping)
    return second


def damp_(second: torch.Tensor, diagonal: torch.Tensor, damping: float) -> None:
    """Set the diagonal of second moments in place, as `damped` does.

    Args:
        second: Shape (groups, columns, columns).
        diagonal: Its diagonal before, shape (groups, columns).
        damping: As for `damped`.
    """
    mean = diagonal.mean(dim=-1, keepdim=True)
    added = torch.where(mean > 0, damping * mean, 1.0)
    second.diagonal(dim1=-2, dim2=-1).copy_(diagonal + added)


def upper_factor(second: torch.Tensor) -> torch.Tensor:
    """Return the upper triangular U with a positive diagonal of `second = U U^T`.

    Args:
        second: Positive definite, shape (..., columns, columns).

    Raises:
        torch.linalg.LinAlgError: If it is not positive definite.

    Example:
        >>> upper_factor(torch.tensor([[5.0, 2.0], [2.0, 4.0]]))
        tensor([[2., 1.],
                [0., 2.]])
    """
    return factor_of_flipped(second.flip(-2, -1))


def factor_of_flipped(flipped: torch.Tensor) -> torch.Tensor:
    """Return the `upper_factor` of moments, given with rows and columns in reverse order."""
    factor: torch.Tensor = torch.linalg.cholesky(flipped).flip(-2, -1)
    return factor


def output_error(error: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the mean squared output error that an error of the matrix causes, for each row.

    Args:
        error: Shape (groups, rows, columns).
        second: Second moments of the columns, shape (groups, columns, columns).

    Returns:
        Shape (groups, rows).
    """
    return ((error @ second) * error).sum(dim=-1)


class _Columns:
    """A matrix that is rounded column by column, stored transposed to make columns contiguous."""

    def __init__(self, matrix: torch.Tensor, grid: WeightGrid) -> None:
        self.wanted = matrix.mT.contiguous()
        self.grid = grid.transposed(matrix.shape)
        self.rounded = torch.zeros_like(self.wanted)
        self.error = torch.zeros_like(self.wanted)

    def round(self, column: int, target: torch.Tensor) -> None:
        """Round a column to the value nearest to a target."""
        value = self.grid.row(column).round(target)
        self.rounded[:, column] = value
        self.error[:, column] = self.wanted[:, column] - value

    def feed_forward(self, factor: torch.Tensor) -> None:
        """Round each column so that it compensates the errors of those before it."""
        size = factor.shape[-1]
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            before = factor[:, :start, start:stop].mT @ self.error[:, :start]
            target = self.wanted[:, start:stop] + before
            inside = factor[:, start:stop, start:stop]
            for j in range(stop - start):
                self.round(start + j, target[:, j])
                rest = inside[:, j, j + 1 :, None] * self.error[:, start + j, None]
                target[:, j + 1 :] += rest


def gptq(matrix: torch.Tensor, grid: WeightGrid, *, upper: torch.Tensor) -> torch.Tensor:
    """Round a matrix to the values of a grid, with a small error of its output.

    Args:
        matrix: The wanted weights, shape (groups, rows, columns).
        grid: The values that its weights can have.
        upper: The `upper_factor` of the second moments of the columns that it multiplies, shape
            (groups, columns, columns). They are of dequantized values, which include the zero
            point, and positive definite (see `damped`).

    Returns:
        The rounded matrix, shape and dtype of `matrix`.

    Example:
        If both columns multiply the same input, the second weight compensates the error of the
        first:

        >>> from fpformats import E2M1
        >>> matrix, second = torch.tensor([[[1.2, 1.2]]]), damped(torch.ones(1, 2, 2), 0.001)
        >>> grid = WeightGrid(E2M1, torch.tensor(1.0))
        >>> gptq(matrix, grid, upper=upper_factor(second))
        tensor([[[1.0000, 1.5000]]])
    """
    columns = _Columns(matrix, grid)
    columns.feed_forward(upper / upper.diagonal(dim1=-2, dim2=-1)[..., None, :])
    return columns.rounded.mT.contiguous()
