"""Format and scales of a matrix by the error of its output, not of its weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fpformats import FloatFormat, quantize_scaled
from msfp.ptq.rounding.gptq import output_error

RATIOS: NDArray[np.float64] = np.linspace(0.4, 1.0, 13)
"""The clips tried by default, as fractions of each row's largest magnitude."""


def search_scales(
    matrix: torch.Tensor,
    second: torch.Tensor,
    formats: Sequence[FloatFormat],
    *,
    ratios: NDArray[np.float64] = RATIOS,
) -> tuple[FloatFormat, torch.Tensor]:
    """Find one format for a matrix and one scale for each row, by the error of its output.

    Args:
        matrix: Shape (groups, rows, columns).
        second: Second moments of its columns, shape (groups, columns, columns), or their diagonal
            alone, shape (groups, columns): much cheaper, and blind to what columns share.
        formats: The candidates.
        ratios: Clips to try, as fractions of each row's largest magnitude.

    Returns:
        The format whose total error is least, and its scales, shape (groups, rows, 1). A row of
        zeros has scale 1.

    Raises:
        ValueError: If `formats` is empty.
    """
    if not formats:
        raise ValueError("formats must hold at least one format")
    reach = matrix.abs().amax(dim=-1)
    found = []
    for fmt in formats:
        best_error, best_scale = torch.full_like(reach, torch.inf), torch.ones_like(reach)
        for ratio in ratios:
            scale = torch.where(reach > 0, reach * (float(ratio) / float(fmt.max)), 1.0)
            error = matrix - quantize_scaled(matrix, fmt, scale[..., None])
            if second.dim() == matrix.dim() - 1:
                cost = (error.square() * second[:, None]).sum(dim=-1)
            else:
                cost = output_error(error, second)
            better = cost < best_error
            best_error = torch.where(better, cost, best_error)
            best_scale = torch.where(better, scale, best_scale)
        found.append((best_error.sum().item(), fmt, best_scale[..., None]))
    _, fmt, scale = min(found, key=lambda candidate: candidate[0])
    return fmt, scale
