"""The scale, format and zero point with the least squared error, from one sort of the data.

For one tensor, the values are sorted once and their prefix sums kept; every candidate then costs
one look-up per threshold of its grid instead of a pass over the data. Rows of a matrix (the output
channels of a weight) are short, so their candidates are quantized and measured directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fpformats.convert import values
from fpformats.formats import FloatFormat
from fpformats.scaling import quantize_scaled

if TYPE_CHECKING:
    import torch

RATIOS: NDArray[np.float64] = np.linspace(0.01, 1.0, 100)
"""The clips tried by default, as fractions of the largest magnitude."""


@dataclass(frozen=True)
class Choice:
    """The winner of a search over one tensor.

    Attributes:
        format: The format with the least error.
        scale: Its scale, a float32 number: values are `scale * v + zero_point`.
        zero_point: Its zero point, a float32 number, or None where none was searched.
        squared_error: The sum of squared errors over the searched data.
    """

    format: FloatFormat
    scale: float
    zero_point: float | None
    squared_error: float


class SortedTensor:
    """A tensor sorted once, with the prefix sums from which squared errors are read off.

    Args:
        x: Any number of finite values, any shape.

    Example:
        >>> from fpformats import E2M1
        >>> tensor = SortedTensor(np.array([0.4, 1.0, 2.9]))
        >>> float(tensor.squared_error(E2M1, np.array([1.0]))[0].round(6))
        0.02
    """

    def __init__(self, x: NDArray[Any]) -> None:
        self.values = np.sort(np.asarray(x, dtype=np.float64), axis=None)
        if self.values.size == 0 or not np.isfinite(self.values[[0, -1]]).all():
            raise ValueError("x must hold at least one value and only finite ones")
        zero = np.zeros(1)
        self._sums = np.concatenate([zero, np.cumsum(self.values)])
        self._squares = np.concatenate([zero, np.cumsum(self.values**2)])

    @property
    def min(self) -> float:
        """The smallest value."""
        return float(self.values[0])

    @property
    def max(self) -> float:
        """The largest value."""
        return float(self.values[-1])

    def squared_error(
        self,
        fmt: FloatFormat,
        scales: NDArray[np.float64],
        zero_points: NDArray[np.float64] | float = 0.0,
    ) -> NDArray[np.float64]:
        """Return the sum of squared errors of quantizing with each scale and zero point.

        Args:
            fmt: The format of the codes.
            scales: Positive scales, shape (n,).
            zero_points: Zero points, shape (n,) or a number.

        Returns:
            Shape (n,). Thresholds are the exact midpoints of the grid: a value on one has the
            same error either way.
        """
        grid = np.multiply.outer(scales, values(fmt)) + np.reshape(zero_points, (-1, 1))
        thresholds = (grid[:, 1:] + grid[:, :-1]) / 2
        inner = np.searchsorted(self.values, thresholds)
        edge = np.zeros((len(grid), 1), dtype=inner.dtype)
        edges = np.concatenate([edge, inner, edge + self.values.size], axis=1)
        counts = np.diff(edges)
        sums = np.diff(self._sums[edges])
        squares = np.diff(self._squares[edges])
        error: NDArray[np.float64] = (squares - 2 * grid * sums + grid**2 * counts).sum(axis=1)
        return error.clip(min=0)


def search_tensor(
    x: NDArray[Any] | SortedTensor,
    formats: Sequence[FloatFormat],
    *,
    ratios: NDArray[np.float64] = RATIOS,
    zero_points: NDArray[np.float64] | None = None,
) -> Choice:
    """Find the format, scale and zero point of one tensor with the least squared error.

    Args:
        x: The data, any shape, or its `SortedTensor`.
        formats: The candidates.
        ratios: Clips to try: the largest representable value is put at `ratio * max|x - z|`
            (for unsigned formats `ratio * max(x - z)`).
        zero_points: Zero points to try, or None for none.

    Returns:
        The best choice; of equal ones, the first in the order of formats, zero points, ratios.

    Raises:
        ValueError: If `formats` is empty or the data is empty or not finite.

    Example:
        >>> from fpformats import E1M2, E2M1, E3M0
        >>> choice = search_tensor(np.arange(-7.0, 8.0), [E3M0, E2M1, E1M2])
        >>> str(choice.format), choice.scale, choice.squared_error
        ('E1M2', 2.0, 0.0)
    """
    if not formats:
        raise ValueError("formats must hold at least one format")
    tensor = x if isinstance(x, SortedTensor) else SortedTensor(x)
    offsets = np.zeros(1) if zero_points is None else np.asarray(zero_points, dtype=np.float64)
    offsets = offsets.astype(np.float32).astype(np.float64)
    best: Choice | None = None
    for fmt in formats:
        reach = np.maximum(tensor.max - offsets, 0)
        if fmt.signed:
            reach = np.maximum(reach, np.abs(tensor.min - offsets))
        clips = np.maximum(np.outer(reach, ratios), np.finfo(np.float32).tiny)
        scales = (clips / float(fmt.max)).astype(np.float32).astype(np.float64).ravel()
        scales = np.maximum(scales, np.finfo(np.float32).tiny)
        candidates = np.repeat(offsets, len(ratios))
        errors = tensor.squared_error(fmt, scales, candidates)
        winner = int(errors.argmin())
        if best is None or errors[winner] < best.squared_error:
            offset = None if zero_points is None else float(candidates[winner])
            best = Choice(fmt, float(scales[winner]), offset, float(errors[winner]))
    assert best is not None  # noqa: S101 - formats is not empty
    return best


def search_rows(
    weight: torch.Tensor,
    formats: Sequence[FloatFormat],
    *,
    ratios: NDArray[np.float64] = RATIOS,
) -> tuple[FloatFormat, torch.Tensor, torch.Tensor]:
    """Find one format for a matrix and one scale for each of its rows, by least squared error.

    Args:
        weight: Shape (rows, ...), float32.
        formats: The candidates, signed.
        ratios: Clips to try, as fractions of each row's largest magnitude.

    Returns:
        The format whose total error is least, the scales of shape (rows,) and the squared error
        of each row, shape (rows,). A row of zeros has the median scale of the others, or 1.

    Raises:
        ValueError: If `formats` is empty.
    """
    import torch

    if not formats:
        raise ValueError("formats must hold at least one format")
    rows = weight.detach().flatten(1)
    reach = rows.abs().amax(dim=1)
    best: tuple[FloatFormat, torch.Tensor, torch.Tensor] | None = None
    for fmt in formats:
        best_error = torch.full_like(reach, torch.inf)
        best_scale = torch.ones_like(reach)
        for ratio in ratios:
            scale = torch.where(reach > 0, reach * (float(ratio) / float(fmt.max)), 1.0)
            error = (quantize_scaled(rows, fmt, scale[:, None]) - rows).square().sum(dim=1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
        if best is None or best_error.sum() < best[2].sum():
            best = fmt, best_scale, best_error
    assert best is not None  # noqa: S101 - formats is not empty
    if (live := reach > 0).any():
        best[1][~live] = best[1][live].median()
    return best
