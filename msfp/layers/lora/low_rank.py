"""Low-rank approximation of a matrix."""

from __future__ import annotations

import torch


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of the nearest matrix of a rank: the truncated SVD (Eckart, Young, 1936).

    They are computed from the eigenvectors of the smaller of the two Gram matrices, in float64. For
    the weight of a wide layer, this is much faster than a full SVD.

    Args:
        matrix: Shape (rows, columns), finite.
        rank: Rank of the approximation, reduced if the matrix is smaller.

    Returns:
        `down` of shape (rank, columns) and `up` of shape (rows, rank), in the matrix's dtype. Each
        has the square roots of the singular values as a factor.

    Example:
        >>> matrix = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        >>> down, up = low_rank(matrix, rank=1)
        >>> torch.allclose(up @ down, matrix)
        True
    """
    rows, columns = matrix.shape
    if rows > columns:
        up, down = low_rank(matrix.mT, rank)
        return down.mT.contiguous(), up.mT.contiguous()
    wide = matrix.double()
    left = torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, -rank:].flip(-1)
    right = left.mT @ wide
    root = right.norm(dim=1, keepdim=True).sqrt()
    down = torch.where(root > 0, right / root, 0)
    return down.to(matrix.dtype), (left * root.mT).to(matrix.dtype)
