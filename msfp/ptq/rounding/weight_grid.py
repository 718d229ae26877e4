"""The values that the weights of a matrix can have."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fpformats import FloatFormat, quantize_scaled


class WeightGrid(NamedTuple):
    """The values of a format times a scale, for each weight of a matrix.

    Attributes:
        format: Any format.
        scale: Scale of each weight, in any shape that broadcasts to that of the matrix, which is
            (groups, rows, columns).
        alternative: A second format, or None.
        chosen: The weights that have it, shape of the matrix; None if there is none.

    Example:
        >>> from fpformats import E2M1, parse
        >>> chosen = torch.tensor([[[False, True]]])
        >>> grid = WeightGrid(E2M1, torch.tensor(1.0), parse("E0M3BN2"), chosen)
        >>> grid.round(torch.tensor([[[5.1, 5.1]]]))
        tensor([[[6., 5.]]])
    """

    format: FloatFormat
    scale: torch.Tensor
    alternative: FloatFormat | None = None
    chosen: torch.Tensor | None = None

    def transposed(self, shape: torch.Size) -> WeightGrid:
        """Return the grid of the transpose of a matrix of a shape, with a scale for each weight."""
        chosen = None if self.chosen is None else self.chosen.expand(shape).mT
        return self._replace(scale=self.scale.expand(shape).mT, chosen=chosen)

    def row(self, index: int) -> WeightGrid:
        """Return the grid of a row; scale and choice must have the shape of the matrix."""
        chosen = None if self.chosen is None else self.chosen[:, index]
        return self._replace(scale=self.scale[:, index], chosen=chosen)

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Return the nearest values."""
        rounded: torch.Tensor = quantize_scaled(values, self.format, self.scale)
        if self.alternative is None or self.chosen is None:
            return rounded
        others: torch.Tensor = quantize_scaled(values, self.alternative, self.scale)
        return torch.where(self.chosen, others, rounded)
