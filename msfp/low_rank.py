"""The best low-rank part of a weight error, in the layer's output."""

from __future__ import annotations

import torch


def low_rank(
    error: torch.Tensor, second: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of the low-rank matrix that takes most of an error's output away.

    With `second = S S^T` it is the truncated SVD of `error @ S`, divided by S again: the minimiser
    of E|(error - up down) x|^2 over all matrices of that rank (Eckart and Young, 1936). With the
    identity for `second` it is the plain SVD of the error.

    Args:
        error: What quantization takes from a weight, shape (rows, columns).
        second: Second moments of the columns, positive definite, shape (columns, columns).
        rank: At most this; fewer where the matrix is smaller.

    Returns:
        `down` of shape (rank, columns) and `up` of shape (rows, rank).

    Raises:
        torch.linalg.LinAlgError: If the moments are not positive definite.

    Example:
        >>> error = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        >>> down, up = low_rank(error, torch.eye(2), rank=1)
        >>> torch.allclose(up @ down, error)
        True
    """
    root = torch.linalg.cholesky(second)
    left, values, right = torch.linalg.svd(error @ root, full_matrices=False)
    up = left[:, :rank] * values[:rank].sqrt()
    down = values[:rank, None].sqrt() * right[:rank]
    return torch.linalg.solve_triangular(root, down, upper=False, left=False), up
