"""The methods to round a matrix of weights to its grid, by their names in configs.

To add a method, add an entry to `ROUNDINGS` and its key to `msfp.config.Rounding`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from fpformats import FloatFormat, quantize_scaled
from msfp.config import Rounding
from msfp.ptq.rounding.gptq import gptq


class RoundMatrix(Protocol):
    """A rounding method."""

    def __call__(
        self,
        matrix: torch.Tensor,
        fmt: FloatFormat,
        scale: torch.Tensor,
        *,
        upper: torch.Tensor,
    ) -> torch.Tensor:
        """Return a matrix rounded to the values of a format times a scale.

        Args:
            matrix: The wanted weights, shape (groups, rows, columns).
            fmt: Any format.
            scale: Scale of each weight, in any shape that broadcasts to that of the matrix.
            upper: The `upper_factor` of the damped second moments of the columns that it
                multiplies, shape (groups, columns, columns).
        """


def nearest(
    matrix: torch.Tensor,
    fmt: FloatFormat,
    scale: torch.Tensor,
    *,
    upper: torch.Tensor,
) -> torch.Tensor:
    """Round each weight to the nearest value, without using the moments."""
    del upper
    rounded: torch.Tensor = quantize_scaled(matrix.contiguous(), fmt, scale)
    return rounded


ROUNDINGS: dict[Rounding, RoundMatrix] = {"gptq": gptq, "nearest": nearest}
"""All rounding methods, by name."""
