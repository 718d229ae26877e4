"""The sum of squared errors of quantizing data, as a function of format, scale and zero point.

There are two ways to compute it. Short rows are quantized for each candidate. Long rows are sorted
once: the data that round to one value of a format are then neighbours, so a candidate costs one
look-up for each value of its format, whatever the number of data. If n data with sum S become the
grid value g, the error is the sum of all squared data plus the sum of g * (g * n - 2 * S) over the
grid values.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from fpformats.engine import cpu
from fpformats.ops.elementwise import quantize, values
from fpformats.ops.scaled import quantize_scaled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fpformats.formats import FloatFormat

CHUNK = 1 << 16
"""Numbers processed at once: few enough to stay in the cache and to bound the memory."""


BLOCK = 128
"""Number of neighbours in a sorted row that share one set of moments."""


def sorting_pays(length: int, fmt: FloatFormat) -> bool:
    """Tell whether a row is so long that sorting it beats quantizing it for every candidate."""
    return length > 2000 + 120 * fmt.code_count


class Sums(NamedTuple):
    """Weighted sums over each row; x is a datum, q the value of the format that it rounds to.

    Attributes:
        w: Sum of the weights, shape (rows,), float64, like all others.
        q: Sum of w * q.
        qq: Sum of w * q**2.
        x: Sum of w * x.
        xq: Sum of w * x * q.
        xx: Sum of w * x**2.
    """

    w: NDArray[np.float64]
    q: NDArray[np.float64]
    qq: NDArray[np.float64]
    x: NDArray[np.float64]
    xq: NDArray[np.float64]
    xx: NDArray[np.float64]


class Objective(Protocol):
    """The data as a search uses them: rows, each with a scale and a zero point.

    Scales and zero points have the dtype of the data; zero points may be None.
    """

    dtype: np.dtype[Any]
    """Dtype of the data, and of the operations that quantize them."""
    low: NDArray[np.float64]
    """Smallest value of each row, shape (rows,)."""
    high: NDArray[np.float64]
    """Largest value of each row, shape (rows,)."""

    def take(self, rows: NDArray[np.intp]) -> Objective:
        """Give some of the rows."""

    def errors(
        self, fmt: FloatFormat, scales: NDArray[Any], zero_points: NDArray[Any] | None
    ) -> NDArray[np.float64]:
        """Give the error of each candidate of each row: all of shape (rows, candidates)."""

    def sums(self, fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any] | None) -> Sums:
        """Give the sums that least squares need, for one candidate of each row, shape (rows,)."""

    def measured(
        self, fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any] | None
    ) -> NDArray[np.float64]:
        """Give the accurate error of one candidate of each row; all of shape (rows,)."""


class QuantizedRows:
    """Rows that are quantized for each candidate, which is faster than sorting if they are short.

    Args:
        x: Data, shape (rows, length), float32 or float64.
        weights: Weights of the squared errors, of the shape of `x`, float64; None for 1.
    """

    def __init__(self, x: NDArray[Any], weights: NDArray[np.float64] | None) -> None:
        self.dtype = x.dtype
        self.low = x.min(axis=1).astype(np.float64)
        self.high = x.max(axis=1).astype(np.float64)
        self._x = x
        self._weights = weights

    def take(self, rows: NDArray[np.intp]) -> QuantizedRows:
        """Give some of the rows."""
        return QuantizedRows(self._x[rows], None if self._weights is None else self._weights[rows])

    def errors(
        self, fmt: FloatFormat, scales: NDArray[Any], zero_points: NDArray[Any] | None
    ) -> NDArray[np.float64]:
        """Quantize with each candidate; see `Objective`."""
        compiled = cpu.errors(self._x, self._weights, fmt, scales, zero_points)
        if compiled is not None:
            return compiled
        parts = []
        for part in _parts(scales.shape[1], self._x.size):
            scale = scales[:, part, None]
            zero_point = None if zero_points is None else zero_points[:, part, None]
            shape = (*scale.shape[:2], self._x.shape[1])
            x = np.broadcast_to(self._x[:, None, :], shape)
            difference = np.subtract(
                quantize_scaled(x, fmt, scale, zero_point), x, dtype=np.float64
            )
            if self._weights is None:
                parts.append(np.einsum("rcx,rcx->rc", difference, difference))
            else:
                np.square(difference, out=difference)
                parts.append((difference @ self._weights[:, :, None])[:, :, 0])
        return np.concatenate(parts, axis=1)

    def sums(self, fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any] | None) -> Sums:
        """Quantize and add up; see `Objective`."""
        compiled = cpu.sums(self._x, self._weights, fmt, scale, zero_point)
        if compiled is not None:
            return Sums(*compiled)
        shifted = self._x if zero_point is None else self._x - zero_point[:, None]
        with np.errstate(over="ignore"):
            q = quantize(shifted / scale[:, None], fmt).astype(np.float64)
        x = self._x.astype(np.float64)
        w = np.ones_like(x) if self._weights is None else self._weights
        wq = w * q
        return Sums(
            w=w.sum(axis=1),
            q=wq.sum(axis=1),
            qq=(wq * q).sum(axis=1),
            x=(w * x).sum(axis=1),
            xq=(wq * x).sum(axis=1),
            xx=(w * x * x).sum(axis=1),
        )

    def measured(
        self, fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any] | None
    ) -> NDArray[np.float64]:
        """Quantize; see `Objective`."""
        zero_points = None if zero_point is None else zero_point[:, None]
        return self.errors(fmt, scale[:, None], zero_points)[:, 0]


class BinnedRow:
    """One row as bins of neighbouring values; all values of a bin round as its place does.

    Args:
        places: One number for each bin, ascending, shape (bins,), float32 or float64.
        weights: Sum of the weights in each bin, shape (bins,), float64; None for 1.
        sums: Weighted sum of the values in each bin, shape (bins,).
        energy: Weighted sum of the squares of all values.
        low: Smallest value.
        high: Largest value.
    """

    def __init__(
        self,
        places: NDArray[Any],
        weights: NDArray[np.float64] | None,
        sums: NDArray[Any],
        energy: float,
        low: float,
        high: float,
    ) -> None:
        self.dtype = places.dtype
        self.low = np.array([low], dtype=np.float64)
        self.high = np.array([high], dtype=np.float64)
        self._places = places
        self._energy = energy
        self._weights_before = None if weights is None else _prefix_sums(weights)
        self._sums_before = _prefix_sums(sums)

    def take(self, rows: NDArray[np.intp]) -> BinnedRow:  # noqa: ARG002 - there is one row
        """Give the one row."""
        return self

    def errors(
        self, fmt: FloatFormat, scales: NDArray[Any], zero_points: NDArray[Any] | None
    ) -> NDArray[np.float64]:
        """Read the errors off the prefix sums; see `Objective`.

        The midpoints of the grid, in real numbers, divide the bins. At a midpoint, floating-point
        operations may round the other way, but the error is nearly the same either way.
        """
        errors = []
        for part in _parts(scales.shape[1], fmt.code_count):
            zero_point = None if zero_points is None else zero_points[0, part]
            grid = _grid_values(fmt, scales[0, part], zero_point)
            weights, sums = self._split(_thresholds(fmt, scales[0, part], zero_point))
            with np.errstate(over="ignore", invalid="ignore"):
                errors.append(self._energy + (grid * (grid * weights - 2 * sums)).sum(axis=1))
        error = np.concatenate(errors)
        error[np.isnan(error)] = np.inf  # a value of the grid is beyond the dtype
        return error.clip(min=0)[None]

    def sums(self, fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any] | None) -> Sums:
        """Read the sums off the prefix sums; see `Objective`."""
        q = _values(fmt)
        weights, sums = self._split(_thresholds(fmt, scale, zero_point))
        wq = weights * q
        return Sums(
            w=weights.sum(axis=1),
            q=wq.sum(axis=1),
            qq=(wq * q).sum(axis=1),
            x=sums.sum(axis=1),
            xq=(sums * q).sum(axis=1),
            xx=np.array([self._energy]),
        )

    def measured(
        self, fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any] | None
    ) -> NDArray[np.float64]:
        """Read the error off the prefix sums; bins allow nothing more accurate."""
        zero_points = None if zero_point is None else zero_point[:, None]
        return self.errors(fmt, scale[:, None], zero_points)[:, 0]

    def _split(
        self, thresholds: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give weights and sums between thresholds.

        Thresholds have shape (candidates, n), results have shape (candidates, n + 1).
        """
        # Neighbouring candidates have neighbouring thresholds, which makes lookups much faster.
        keys = thresholds.T.astype(self.dtype, order="C")
        edges = np.zeros((len(thresholds), thresholds.shape[1] + 2), dtype=np.intp)
        edges[:, 1:-1] = np.searchsorted(self._places, keys).T
        edges[:, -1] = len(self._places)
        before = edges if self._weights_before is None else self._weights_before[edges]
        return np.diff(before).astype(np.float64), np.diff(self._sums_before[edges])


class SortedRow(BinnedRow):
    """One row, sorted: a histogram of one value in each bin.

    Args:
        x: Data, shape (length,), float32 or float64.
        weights: Weights of the squared errors, of the shape of `x`, float64; None for 1.
    """

    def __init__(self, x: NDArray[Any], weights: NDArray[np.float64] | None) -> None:
        if weights is None:
            x = sums = np.sort(x)
        else:
            order = np.argsort(x)
            x, weights = x[order], weights[order]
            sums = weights * x
        whole = (len(x) - 1) // BLOCK * BLOCK  # at least one value is not in a block
        self._blocks, self._rest = x[:whole].reshape(-1, BLOCK), x[whole:]
        self._block_weights = self._rest_weights = None
        if weights is not None:
            self._block_weights = weights[:whole].reshape(-1, BLOCK)
            self._rest_weights = weights[whole:]
        self._firsts, self._lasts = self._blocks[:, [0, -1]].T.copy()
        self._moments = mass, mean, lean, scatter = _moments(self._blocks, self._block_weights)
        energy = float((scatter + mean * (2 * lean + mean * mass)).sum())
        energy += float((sums[whole:].astype(np.float64) * self._rest).sum())
        super().__init__(x, weights, sums, energy, x[0], x[-1])

    def measured(
        self, fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any] | None
    ) -> NDArray[np.float64]:
        """Add up the squared differences between data and rounded values; see `Objective`.

        A block of neighbours that all round to one value contributes by its mean and the scatter
        around the mean, without cancellation. A block is quantized if a threshold divides it, or
        if a threshold is so near that rounding errors of the operations may decide.
        """
        lower, upper = _sure_thresholds(fmt, scale, zero_point)
        value = np.searchsorted(upper, self._firsts, side="left")
        sure = value == np.searchsorted(lower, self._lasts, side="right")
        weights, means, leans, scatters = (moment[sure] for moment in self._moments)
        with np.errstate(invalid="ignore"):
            offsets = means - _grid_values(fmt, scale, zero_point)[0, value[sure]]
            error = (scatters + offsets * (2 * leans + offsets * weights)).sum()
        measured = self._with_rest(~sure).measured(fmt, scale, zero_point) + error
        return np.where(np.isnan(measured), np.inf, measured)

    def _with_rest(self, blocks: NDArray[np.bool_]) -> QuantizedRows:
        """Give some blocks, and the values outside all blocks, as one row."""
        x = np.append(self._blocks[blocks], self._rest)[None]
        if self._block_weights is None or self._rest_weights is None:
            return QuantizedRows(x, None)
        return QuantizedRows(x, np.append(self._block_weights[blocks], self._rest_weights)[None])


@functools.lru_cache(maxsize=64)
def _values(fmt: FloatFormat) -> NDArray[np.float64]:
    return values(fmt)


def _thresholds(
    fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any] | None
) -> NDArray[np.float64]:
    """Give the midpoints of the grid of each candidate, shape (candidates, values - 1)."""
    q, most = _values(fmt), np.finfo(scale.dtype).max
    with np.errstate(over="ignore"):
        middles: NDArray[np.float64] = np.multiply.outer(
            scale.astype(np.float64), q[:-1] + np.diff(q) / 2
        )
        if zero_point is not None:
            middles += zero_point[:, None]
    return middles.clip(-most, most)


def _sure_thresholds(
    fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any] | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Give numbers below and above each midpoint, farther away than any rounding error.

    The operations round x - z and its quotient by s. The midpoint is a rounded product and sum, and
    the two results are rounded too. In total, the error is at most 3 units in the last place of
    |x| + 2 |z|.
    """
    middles = _thresholds(fmt, scale, zero_point)[0]
    info = np.finfo(scale.dtype)
    reach = abs(middles) + (0.0 if zero_point is None else 2 * abs(float(zero_point[0])))
    doubt = 4 * float(info.eps) * reach + (1 + float(scale[0])) * float(info.smallest_subnormal)
    with np.errstate(over="ignore"):
        return (middles - doubt).astype(scale.dtype), (middles + doubt).astype(scale.dtype)


def _moments(
    blocks: NDArray[Any], weights: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], ...]:
    """Give weight, mean, and sum and sum of squares of differences to the mean, for each block."""
    moments = np.empty((4, len(blocks)))
    for part in _parts(len(blocks), 4 * BLOCK):
        x = blocks[part].astype(np.float64)
        w = None if weights is None else weights[part]
        mass = np.full(len(x), float(BLOCK)) if w is None else w.sum(axis=1)
        total = x.sum(axis=1) if w is None else (w * x).sum(axis=1)
        mean = total / np.maximum(mass, np.finfo(np.float64).tiny)
        mean = mean.clip(x[:, 0], x[:, -1])
        x -= mean[:, None]
        weighted = x if w is None else w * x
        moments[:, part] = mass, mean, weighted.sum(axis=1), np.einsum("ij,ij->i", weighted, x)
    return tuple(moments)


def _grid_values(
    fmt: FloatFormat, scale: NDArray[Any], zero_point: NDArray[Any] | None
) -> NDArray[np.float64]:
    """Give the dequantized values of each candidate, as computed, shape (candidates, values)."""
    with np.errstate(over="ignore"):
        grid: NDArray[Any] = np.multiply.outer(scale, _values(fmt).astype(scale.dtype))
        if zero_point is not None:
            grid += zero_point[:, None]
    return grid.astype(np.float64)


def _prefix_sums(terms: NDArray[Any]) -> NDArray[np.float64]:
    """Give the sums of the first 0, 1, ... terms, in float64."""
    sums = np.zeros(len(terms) + 1)
    for part in _parts(len(terms), 4):
        wide = terms[part].astype(np.float64)
        wide[0] += sums[part.start]
        np.cumsum(wide, out=sums[part.start + 1 : part.start + 1 + len(wide)])
    return sums


def _parts(count: int, size: int) -> list[slice]:
    """Cut `count` items of a size into parts of about `CHUNK` numbers."""
    step = math.ceil(CHUNK / size)
    return [slice(start, start + step) for start in range(0, count, step)]
