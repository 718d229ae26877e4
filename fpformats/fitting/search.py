"""The format, scale and zero point with the least squared error.

Every format is tried at clips that are fractions of the data's largest magnitude. The result
therefore does not depend on the units of the data: if the data are multiplied by a power of two,
the format stays, and scale and zero point are multiplied alike. The best candidate is then refined
by two steps (Lloyd, Least Squares Quantization in PCM, 1982, with two parameters). For a fixed
assignment of data to values, the best scale and zero point are a least-squares fit. For a fixed
scale and zero point, the best assignment is to the nearest value. Neither step can raise the
error, and both are repeated until it stops falling.

The reported error is that of `quantize_scaled` with the scale and zero point found.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fpformats.engine.arrays import compute_dtype, float_dtype_of, grid_of, is_tensor, library_of
from fpformats.fitting.granularity import as_rows, block_sizes
from fpformats.fitting.histogram import Histogram
from fpformats.fitting.objective import CHUNK, BinnedRow, QuantizedRows, SortedRow, sorting_pays
from fpformats.formats import FloatFormat
from fpformats.kernels.grid import FLOAT_DTYPES
from fpformats.ops.scaled import quantize_scaled
from fpformats.parsing import as_format

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from fpformats.fitting.objective import Objective, Sums
    from fpformats.kernels.grid import FloatDtype
    from fpformats.parsing import FormatLike

RATIOS: NDArray[np.float64] = np.linspace(0.01, 1.0, 100)
"""The clips tried by default, as fractions of the largest magnitude."""

ZERO_POINTS: NDArray[np.float64] = np.linspace(0.0, 1.0, 31)
"""Zero points to try for unsigned formats, as fractions of the smallest value."""

MAX_BITS = 16
MIN_GAIN = 1e-8
"""Refinement continues while it lowers the error by more than this fraction."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The result of a search.

    Scale and zero point can be passed to `quantize_scaled`. They are numbers if all data share
    them. Otherwise they have the kind and device of the data and are float32 (float64 for float64
    data). Their shape broadcasts with the data or has one entry for each block.

    Attributes:
        format: The format, one for all data.
        scale: The scale.
        zero_point: The zero point; None if none was searched.
        squared_error: Sum of the weighted squared errors over all data.
        squared_errors: The same for each scale, of the shape of `scale`, float64.
        block_size: Sizes of the blocks that share a scale, as they were given.
        by_format: The best choice of each candidate format, in the order of the candidates.
    """

    format: FloatFormat
    scale: Any
    zero_point: Any
    squared_error: float
    squared_errors: Any
    block_size: tuple[int, ...] | None = None
    by_format: Mapping[FloatFormat, Choice] = field(default_factory=dict, repr=False)

    def quantize(self, x: Any) -> Any:
        """Round `x` with this choice, by `fpformats.quantize_scaled`."""
        return quantize_scaled(
            x, self.format, self.scale, self.zero_point, block_size=self.block_size
        )


def search(
    x: Any,
    formats: Sequence[FormatLike],
    *,
    ratios: NDArray[np.float64] = RATIOS,
    zero_points: NDArray[np.float64] | None = None,
    weights: Any = None,
    axis: int | None = None,
    block_size: tuple[int, ...] | None = None,
    refine: bool = True,
    whole_zero_points: bool = False,
) -> Choice:
    """Find the format, scale and zero point with the least sum of squared errors.

    All data share one format. They also share one scale, unless `axis` or `block_size` gives each
    channel or block its own. If the data of a scale are all zero, any scale serves; the result is
    then the median of the other scales, or 1 if there are none.

    Args:
        x: Array, tensor or number of finite values, any shape; or a `Histogram`. The search runs
            on the CPU, in float32 or, for float64 values, in float64.
        formats: The candidates, of at most 16 bits, or their names. Uniform formats are integers
            times a power of two: from -7 to 7 for E0M3, from 0 to 15 for E0M4U.
        ratios: Clips to try. The largest value of the format is mapped to this fraction of the
            largest magnitude, or of the largest distance above the zero point.
        zero_points: Zero points to try for unsigned formats, as fractions of the smallest value;
            `ZERO_POINTS` is a sensible grid. None for no zero point.
        weights: Weights of the squared errors, 0 or more, of the kind of `x` and broadcasting to
            its shape. Values of weight 0 are ignored. None for 1.
        axis: Axis along which every index (channel) has its own scale.
        block_size: Sizes of the blocks that have their own scale, as in `quantize_scaled`.
        refine: Whether to refine the best candidates by least squares.
        whole_zero_points: Whether zero points are whole numbers of the format's steps times the
            scale, rounded to the dtype. Zero is then the value of an integer, so that products of
            integers need no correction; see `encode_steps`.

    Returns:
        The choice with the least error over all data; of equal ones, the first in `formats`.

    Raises:
        TypeError: If `x` is not floating point, `formats` holds anything but formats or names, or
            a histogram comes with weights or blocks.
        ValueError: If the data are empty or not finite, or an argument is out of range.

    Warns:
        RuntimeWarning: If a histogram has seen NaN or infinities. They are left out.

    Example:
        >>> from fpformats import E1M2, E2M1, E3M0
        >>> choice = search(np.arange(-7.0, 8.0), [E3M0, E2M1, E1M2])
        >>> str(choice.format), choice.scale, choice.squared_error
        ('E1M2', 2.0, 0.0)
    """
    dtype = (
        FLOAT_DTYPES["float32"] if isinstance(x, Histogram) else compute_dtype(float_dtype_of(x))
    )
    formats = _checked_formats(formats, dtype)
    grid = _Grid(
        _checked_ratios(ratios), _checked_fractions(zero_points), refine, whole_zero_points
    )
    own_scales = axis is not None or block_size is not None
    if isinstance(x, Histogram):
        if weights is not None or own_scales:
            raise TypeError(
                "x is a Histogram; weights, axis and block_size need the data themselves"
            )
        shape, batches = None, iter([_of_histogram(x)])
    else:
        lengths = tuple(getattr(x, "shape", ()))
        sizes = block_sizes(axis, block_size, lengths)
        shape = [-(-n // size) for n, size in zip(lengths, sizes, strict=True)]
        batches = _batches(*as_rows(x, weights, dtype, sizes), formats)
    found = [[_best(objective(fmt), fmt, grid) for fmt in formats] for objective in batches]
    choices = {
        fmt: _choice(fmt, _joined(parts), x, shape if own_scales else None, block_size)
        for fmt, parts in zip(formats, zip(*found, strict=True), strict=True)
    }
    winner = min(choices.values(), key=lambda choice: choice.squared_error)
    return replace(winner, by_format=choices)


class _Grid(NamedTuple):
    """The candidates to try with each format, relative to the data."""

    ratios: NDArray[np.float64]
    zero_points: NDArray[np.float64] | None
    refine: bool
    whole: bool


class _Best(NamedTuple):
    """The best candidate of each row with one format; arrays of shape (rows,)."""

    scale: NDArray[Any]
    zero_point: NDArray[Any] | None
    error: NDArray[np.float64]
    zero: NDArray[np.bool_]
    """Whether the data are all zero and become zero."""


def _best(objective: Objective, fmt: FloatFormat, grid: _Grid) -> _Best:
    scales, zero_points = _candidates(objective, fmt, grid)
    errors = objective.errors(fmt, scales, zero_points)
    winner = np.arange(len(errors)), errors.argmin(axis=1)
    scale, zero_point = scales[winner], None if zero_points is None else zero_points[winner]
    error = objective.measured(fmt, scale, zero_point)
    if grid.refine:
        refined, moved = _refined(objective, fmt, scale, zero_point, whole=grid.whole)
        measured = objective.measured(fmt, refined, moved)
        better = measured < error
        scale, error = np.where(better, refined, scale), np.where(better, measured, error)
        zero_point = None if zero_point is None else np.where(better, moved, zero_point)
    # Zeros become zero with any scale, as long as the format has a zero.
    zero = (objective.low == 0) & (objective.high == 0) & fmt.zero
    return _Best(scale, zero_point, error, zero)


def _candidates(
    objective: Objective, fmt: FloatFormat, grid: _Grid
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Give scales and zero points to try for each row, both of shape (rows, candidates)."""
    low, high = objective.low[:, None], objective.high[:, None]
    magnitude = np.maximum(abs(low), abs(high))
    offsets = np.zeros_like(low)
    if grid.zero_points is not None and not fmt.signed:
        offsets = (low * grid.zero_points).astype(objective.dtype)
    reach = magnitude if fmt.signed else high - offsets
    reach = np.where(reach > 0, reach, magnitude)
    clips = (reach[:, :, None] * grid.ratios).reshape(len(reach), -1)
    scales = _positive(clips / fmt.max, objective.dtype)
    if grid.zero_points is None or fmt.signed:
        return scales, None
    shifts = np.repeat(offsets, len(grid.ratios), axis=1)
    if grid.whole:
        shifts = _shifts(_steps(fmt, scales, shifts), fmt, scales)
    return scales, shifts


def _steps(fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any]) -> NDArray[np.float64]:
    """Give zero points as whole numbers of steps."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        steps = np.round(zero_point / (scale.astype(np.float64) * fmt.step))
    return np.nan_to_num(steps) + 0.0  # no negative zero


def _shifts(steps: NDArray[np.float64], fmt: FloatFormat, scale: NDArray[Any]) -> NDArray[Any]:
    """Give zero points from whole numbers of steps, rounded once."""
    shifts: NDArray[Any] = (steps * fmt.step * scale.astype(np.float64)).astype(scale.dtype)
    return shifts


def _refined(
    objective: Objective,
    fmt: FloatFormat,
    scale: NDArray[Any],
    zero_point: NDArray[Any] | None,
    *,
    whole: bool,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Fit scale and zero point of each row to its rounded data, until the error stops falling.

    Whole zero points keep their number of steps.
    """
    steps = None if zero_point is None or not whole else _steps(fmt, scale, zero_point)
    scale, zero_point = scale.copy(), None if zero_point is None else zero_point.copy()
    sums = objective.sums(fmt, scale, zero_point)
    error = _error(sums, scale, zero_point)
    active = np.arange(len(scale))
    while active.size:
        shift = None if zero_point is None else zero_point[active]
        if steps is None:
            fitted, moved = _least_squares(sums, scale[active], shift)
        else:
            fitted = _least_squares_scale(sums, scale[active], steps[active] * fmt.step)
            moved = _shifts(steps[active], fmt, fitted)
        sums = objective.take(active).sums(fmt, fitted, moved)
        errors = _error(sums, fitted, moved)
        gains = errors < error[active] * (1 - MIN_GAIN)
        active, sums = active[gains], type(sums)(*(each[gains] for each in sums))
        scale[active], error[active] = fitted[gains], errors[gains]
        if zero_point is not None and moved is not None:
            zero_point[active] = moved[gains]
    return scale, zero_point


def _error(sums: Sums, scale: NDArray[Any], zero_point: NDArray[Any] | None) -> NDArray[np.float64]:
    """Give the sum of w * (s * q + z - x)**2, in real numbers."""
    s, z = scale.astype(np.float64), 0.0 if zero_point is None else zero_point.astype(np.float64)
    grid = s * (s * sums.qq + 2 * z * sums.q) + z * z * sums.w
    error: NDArray[np.float64] = grid - 2 * (s * sums.xq + z * sums.x) + sums.xx
    return error.clip(min=0)


def _least_squares(
    sums: Sums, scale: NDArray[Any], zero_point: NDArray[Any] | None
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Solve for the scale s and zero point z that minimise the sum of w * (s * q + z - x)**2.

    If the scale has no positive solution, it stays, and only the zero point is fitted.
    """
    with np.errstate(all="ignore"):
        if zero_point is None:
            fitted = sums.xq / sums.qq
        else:
            fitted = (sums.w * sums.xq - sums.q * sums.x) / (sums.w * sums.qq - sums.q**2)
        usable = (fitted > 0) & np.isfinite(fitted)
        scale = np.where(usable, _positive(fitted, scale.dtype), scale)
        if zero_point is None:
            return scale, None
        moved = ((sums.x - scale * sums.q) / sums.w).astype(scale.dtype)
        return scale, np.where(np.isfinite(moved), moved, zero_point)


def _least_squares_scale(
    sums: Sums, scale: NDArray[Any], shift: NDArray[np.float64]
) -> NDArray[Any]:
    """Solve for the scale s that minimises the sum of w * (s * (q + shift) - x)**2.

    If the scale has no positive solution, it stays.
    """
    with np.errstate(all="ignore"):
        squares = sums.qq + shift * (2 * sums.q + shift * sums.w)
        fitted = (sums.xq + shift * sums.x) / squares
        usable = (fitted > 0) & np.isfinite(fitted)
        return np.where(usable, _positive(fitted, scale.dtype), scale)


def _positive(scales: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Give scales in the dtype, at least its smallest positive number."""
    info = np.finfo(dtype)
    return scales.clip(float(info.smallest_subnormal), float(info.max)).astype(dtype)


def _of_histogram(histogram: Histogram) -> Callable[[FloatFormat], Objective]:
    if histogram.count == 0:
        raise ValueError("x is a Histogram that has seen no finite number")
    if histogram.nonfinite:
        warnings.warn(
            f"x has seen {histogram.nonfinite} numbers that are NaN or infinite; they are left out",
            RuntimeWarning,
            stacklevel=3,
        )
    counts, sums, squares = histogram.bins()
    places = (sums / counts).astype(np.float32)
    energy = float(squares.sum())
    row = BinnedRow(places, counts.astype(float), sums, energy, histogram.min, histogram.max)
    return lambda _: row


class _Rows:
    """The objective of some rows for a format: quantized rows, or one row sorted on first use."""

    def __init__(self, x: NDArray[Any], weights: NDArray[np.float64] | None) -> None:
        self._x = x
        self._weights = weights
        self._sorted: SortedRow | None = None

    def __call__(self, fmt: FloatFormat) -> Objective:
        if not sorting_pays(self._x.shape[1], fmt):
            return QuantizedRows(self._x, self._weights)
        if self._sorted is None:
            weights = None if self._weights is None else self._weights[0]
            self._sorted = SortedRow(self._x[0], weights)
        return self._sorted


def _batches(
    rows: NDArray[Any], weights: NDArray[np.float64] | None, formats: Sequence[FloatFormat]
) -> Iterator[_Rows]:
    """Cut rows into batches: single rows if they are sorted, else several at once."""
    length = rows.shape[1]
    step = 1 if any(sorting_pays(length, fmt) for fmt in formats) else -(-CHUNK // length)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        yield _Rows(rows[part], None if weights is None else weights[part])


def _joined(parts: Sequence[_Best]) -> _Best:
    scale, zero_points, error, zero = zip(*parts, strict=True)
    shifted = zero_points[0] is not None
    best = _Best(
        np.concatenate(scale),
        np.concatenate(zero_points) if shifted else None,
        np.concatenate(error),
        np.concatenate(zero),
    )
    others = best.scale[~best.zero]
    best.scale[best.zero] = np.median(others) if others.size else 1
    return best


def _choice(
    fmt: FloatFormat,
    best: _Best,
    x: Any,
    shape: list[int] | None,
    block_size: tuple[int, ...] | None,
) -> Choice:
    """Make the choice in the kind of the data; `shape` is that of scales, None for numbers."""
    total = math.fsum(best.error)
    if shape is None:
        zero_point = None if best.zero_point is None else float(best.zero_point[0])
        return Choice(fmt, float(best.scale[0]), zero_point, total, total)

    def shaped(row_wise: NDArray[Any]) -> Any:
        array = row_wise.reshape(shape)
        return library_of(x).from_numpy(array).to(x.device) if is_tensor(x) else array

    zero_points = None if best.zero_point is None else shaped(best.zero_point)
    return Choice(fmt, shaped(best.scale), zero_points, total, shaped(best.error), block_size)


def _checked_formats(formats: Sequence[FormatLike], dtype: FloatDtype) -> list[FloatFormat]:
    given: object = formats
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"formats is {formats!r}; it must be a sequence of formats")
    if not formats:
        raise ValueError("formats must hold at least one format")
    checked = []
    for each in formats:
        if not isinstance(each, FloatFormat | str):
            raise TypeError(f"formats has {each!r}; it must hold formats or their names")
        fmt = as_format(each)
        if fmt.bits > MAX_BITS:
            raise ValueError(
                f"formats has {fmt} of {fmt.bits} bits; at most {MAX_BITS} are allowed"
            )
        grid_of(fmt, dtype)
        checked.append(fmt)
    return checked


def _checked_ratios(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    array = np.asarray(ratios, dtype=np.float64)
    if array.ndim != 1 or not array.size or not (np.isfinite(array) & (array > 0)).all():
        raise ValueError("ratios must be one-dimensional, positive and finite, at least one")
    return array


def _checked_fractions(zero_points: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    if zero_points is None:
        return None
    array = np.asarray(zero_points, dtype=np.float64)
    if array.ndim != 1 or not array.size or not ((array >= 0) & (array <= 1)).all():
        raise ValueError("zero_points must be one-dimensional, from 0 to 1, at least one")
    return array
