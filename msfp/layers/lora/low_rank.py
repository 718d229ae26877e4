"""The nearest matrix of a low rank."""

from __future__ import annotations

import torch


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of the nearest matrix of a rank: the truncated SVD (Eckart, Young, 1936).

    It is found from the eigenvectors of the smaller of the two Gram matrices, in float64: of a wide
    layer's weight that takes a small part of the time of all singular values.

    Args:
        matrix: Shape (rows, columns), finite.
        rank: At most this; less where the matrix is smaller.

    Returns:
        `down` of shape (rank, columns) and `up` of shape (rows, rank), of the matrix's dtype, with
        the roots of the singular values in either.

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
