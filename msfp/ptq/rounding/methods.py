"""The methods to round a matrix of weights to its grid, by their names in configs.

To add a method, add an entry to `ROUNDINGS` and its key to `msfp.config.Rounding`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from msfp.config import Rounding
from msfp.ptq.rounding.gptq import gptq
from msfp.ptq.rounding.weight_grid import WeightGrid


class RoundMatrix(Protocol):
    """A rounding method."""

    def __call__(
        self,
        matrix: torch.Tensor,
        grid: WeightGrid,
        *,
        upper: torch.Tensor,
    ) -> torch.Tensor:
        """Return a matrix rounded to the values of a grid.

        Args:
            matrix: The wanted weights, shape (groups, rows, columns).
            grid: The values that its weights can have.
            upper: The `upper_factor` of the damped second moments of the columns that it
                multiplies, shape (groups, columns, columns).
        """


def nearest(
    matrix: torch.Tensor,
    grid: WeightGrid,
    *,
    upper: torch.Tensor,
) -> torch.Tensor:
    """Round each weight to the nearest value, without using the moments."""
    del upper
    return grid.round(matrix.contiguous())


ROUNDINGS: dict[Rounding, RoundMatrix] = {"gptq": gptq, "nearest": nearest}
"""All rounding methods, by name."""
