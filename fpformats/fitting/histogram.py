"""A histogram of a stream of numbers, with bounded memory and exact merging.

A bin is the set of float32 numbers with the same sign, exponent and upper 11 bits of the mantissa.
Within a bin, a number is a base plus a power of two times an integer, the low mantissa bits. A bin
stores its count, the sum of these integers and the sum of their squares, all as integers. The sums
of the numbers and of their squares follow from these. Merging is associative to the last bit: the
histogram does not depend on how a stream is cut, ordered and spread over processes.

Only nonempty bins are kept, at 28 bytes each: about 40 000 bins (1 MiB) for a million normally
distributed numbers, and at most 2**20 bins (28 MiB).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fpformats.engine import cpu
from fpformats.engine.arrays import float_dtype_of, is_tensor, widened
from fpformats.kernels.grid import FLOAT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MANTISSA_BITS = 11
"""Mantissa bits that distinguish bins: a bin is at most 2**-11 of its magnitude wide."""

_LOW_BITS = 23 - MANTISSA_BITS
_SIGN = 1 << (8 + MANTISSA_BITS)
_INFINITY = 255 << MANTISSA_BITS
"""Bins from this one on, without the sign bit, are for infinities and NaN."""
_CHUNK = 1 << 20
"""Numbers processed at once, to bound the memory."""
_MAX_REPEATS = 1 << 16


class Bins(NamedTuple):
    """The nonempty bins of finite numbers, in ascending order of the numbers.

    Attributes:
        counts: Number of numbers in each bin, shape (bins,), int64.
        sums: Sum of the numbers, float64.
        squares: Sum of their squares, float64.
    """

    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]


class Histogram:
    """The distribution of a stream of numbers, in enough detail to search formats and scales.

    NaN and infinities are counted, but left out of everything else.

    Example:
        >>> histogram = Histogram()
        >>> for batch in np.split(np.arange(1000, dtype=np.float32), 10):
        ...     histogram.update(batch)
        >>> histogram
        Histogram(1000 numbers from 0 to 999)
        >>> histogram.mean, histogram.quantile(0.25)
        (499.5, 249.0)
    """

    def __init__(self) -> None:
        self._bins: NDArray[np.uint32] = np.zeros(0, dtype=np.uint32)
        self._moments: NDArray[np.int64] = np.zeros((3, 0), dtype=np.int64)
        self._low = math.inf
        self._high = -math.inf

    def __repr__(self) -> str:
        seen = f"{self.count} numbers"
        if self.count:
            seen += f" from {self.min:g} to {self.max:g}"
        return f"Histogram({seen}{f', {self.nonfinite} not finite' if self.nonfinite else ''})"

    def update(self, x: Any, repeats: int = 1) -> None:
        """Add numbers.

        Args:
            x: Array, tensor (on any device) or number of float16, bfloat16, float32 or float64,
                any shape. Float64 is rounded to float32.
            repeats: How many times to count each number, 1 to 65536: an integer weight.

        Raises:
            TypeError: If `x` is not floating point.
            ValueError: If `repeats` is out of range.
            OverflowError: If a bin would exceed 64 bits, which takes at least 2**39 numbers.
        """
        float_dtype_of(x)
        if type(repeats) is not int or not 1 <= repeats <= _MAX_REPEATS:
            raise ValueError(
                f"repeats is {repeats!r}; it must be an integer from 1 to {_MAX_REPEATS}"
            )
        with np.errstate(over="ignore"):
            numbers = widened(x, FLOAT_DTYPES["float32"])
        if is_tensor(numbers):
            numbers = numbers.cpu().numpy()
        numbers = np.ascontiguousarray(numbers).reshape(-1)
        for start in range(0, len(numbers), _CHUNK):
            self._add(numbers[start : start + _CHUNK], repeats)

    def merge(self, other: Histogram) -> None:
        """Add the numbers of another histogram, as if this one had seen them.

        Raises:
            TypeError: If it is not a histogram.
            OverflowError: If a bin would exceed 64 bits.
        """
        if not isinstance(other, Histogram):
            raise TypeError(f"other is a {type(other).__name__}; it must be a Histogram")
        self._add_moments(other._bins, other._moments)
        self._widen(other._low, other._high)

    def __add__(self, other: Histogram) -> Histogram:
        """Give a new histogram of the numbers of both."""
        if not isinstance(other, Histogram):
            return NotImplemented
        both = Histogram()
        both.merge(self)
        both.merge(other)
        return both

    def all_reduce(self, group: Any = None) -> None:
        """Merge the histograms of all processes of a torch.distributed group, in each process.

        Args:
            group: The process group; None for the default one.

        Raises:
            OverflowError: If a bin could exceed 64 bits; every process then raises it.
        """
        import torch
        import torch.distributed as dist

        device = "cuda" if "nccl" in str(dist.get_backend(group)) else "cpu"
        most = float(self._moments[2].max(initial=0)) * dist.get_world_size(group)
        ends = torch.tensor([-self._low, self._high, most], dtype=torch.float64, device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX, group)
        low, high, most = ends.tolist()
        if most > np.iinfo(np.int64).max:
            raise OverflowError(
                "the histograms have seen too many numbers for their bins of 64 bits"
            )
        used = torch.zeros(2 * _SIGN, dtype=torch.uint8)
        used[torch.from_numpy(self._bins.astype(np.int64))] = 1
        used = used.to(device)
        dist.all_reduce(used, dist.ReduceOp.MAX, group)
        self._places(np.flatnonzero(used.cpu().numpy()).astype(np.uint32))
        moments = torch.from_numpy(self._moments).to(device)
        dist.all_reduce(moments, dist.ReduceOp.SUM, group)
        self._moments = moments.cpu().numpy()
        self._widen(-low, high)

    @property
    def count(self) -> int:
        """Number of finite numbers seen, repeats included."""
        return int(self._moments[0, self._finite].sum())

    @property
    def nonfinite(self) -> int:
        """Number of NaN and infinities seen, repeats included."""
        return int(self._moments[0, ~self._finite].sum())

    @property
    def min(self) -> float:
        """Smallest finite number; infinity if there is none."""
        return self._low

    @property
    def max(self) -> float:
        """Largest finite number; minus infinity if there is none."""
        return self._high

    @property
    def mean(self) -> float:
        """Mean of the finite numbers; NaN if there are none."""
        return float(self.bins().sums.sum()) / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean; NaN if there are no finite numbers."""
        if not self.count:
            return math.nan
        counts, lows, squares, bases, steps = self._parts()
        bases = bases - self.mean
        spread = counts * bases**2 + 2 * bases * steps * lows + steps**2 * squares
        return float(spread.sum()) / self.count

    def quantile(self, fraction: float) -> float:
        """Give a quantile, accurate to the width of a bin: 2**-11 of its magnitude.

        Args:
            fraction: 0 for the smallest number (exactly), 1 for the largest (exactly).

        Returns:
            The mean of the bin that holds the number of this rank.

        Raises:
            ValueError: If the fraction is not from 0 to 1, or no finite number was seen.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction is {fraction}; it must be from 0 to 1")
        if not self.count:
            raise ValueError("no finite number was seen")
        if fraction in (0, 1):
            return self.max if fraction else self.min
        counts, sums, _ = self.bins()
        rank = math.ceil(fraction * self.count)
        holder = int(np.searchsorted(np.cumsum(counts), rank))
        return float(sums[holder] / counts[holder])

    def bins(self) -> Bins:
        """Give the nonempty bins of finite numbers, in ascending order."""
        counts, lows, squares, bases, steps = self._parts()
        return Bins(
            counts=counts,
            sums=counts * bases + steps * lows,
            squares=counts * bases**2 + 2 * bases * steps * lows + steps**2 * squares,
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """Give the contents of the histogram as arrays, for saving.

        Returns:
            "bins", uint32 of shape (bins,), "moments", int64 of shape (3, bins), and "ends", the
            smallest and the largest number, float32 of shape (2,).
        """
        ends = np.array([self._low, self._high], dtype=np.float32)
        return {"bins": self._bins.copy(), "moments": self._moments.copy(), "ends": ends}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Histogram:
        """Restore a histogram from the result of `state`.

        Args:
            state: Arrays or tensors, as `state` gives them.

        Raises:
            ValueError: If an entry is missing, or the entries do not fit together.
        """
        missing = {"bins", "moments", "ends"} - set(state)
        if missing:
            raise ValueError(f"state has no {', '.join(sorted(missing))}")
        bins: NDArray[Any] = np.asarray(state["bins"])
        moments, ends = np.asarray(state["moments"]), np.asarray(state["ends"])
        if moments.shape != (3, len(bins)) or ends.shape != (2,):
            raise ValueError(
                f"state has moments of shape {moments.shape} and ends of shape {ends.shape}; "
                f"{len(bins)} bins need (3, {len(bins)}) and (2,)"
            )
        if not _is_state(bins, moments):
            raise ValueError(
                f"state is not of a histogram: bins must be ascending integers below {2 * _SIGN}, "
                "moments integers of 0 or more"
            )
        histogram = cls()
        histogram._add_moments(bins.astype(np.uint32), moments.astype(np.int64))
        if ends[0] > ends[1] and histogram.count:
            raise ValueError(f"state has the ends {ends.tolist()}, of which the first is larger")
        histogram._widen(*ends.tolist())
        return histogram

    def _add(self, numbers: NDArray[np.float32], repeats: int) -> None:
        finite = numbers
        if not (np.isfinite(numbers.min()) and np.isfinite(numbers.max())):
            finite = numbers[np.isfinite(numbers)]
        if finite.size:
            self._widen(float(finite.min()), float(finite.max()))
        bins, moments = cpu.moments(numbers, _LOW_BITS) or _moments(numbers)
        self._add_moments(bins, moments * repeats)

    def _add_moments(self, bins: NDArray[Any], moments: NDArray[np.int64]) -> None:
        """Add moments to bins, which are in ascending order."""
        places = self._places(bins)
        added = self._moments[:, places] + moments
        if (added < 0).any():
            raise OverflowError("the histogram has seen too many numbers for its bins of 64 bits")
        self._moments[:, places] = added

    def _places(self, bins: NDArray[Any]) -> NDArray[np.intp]:
        """Give the positions of bins in the moments, after inserting the bins that are missing."""
        places = np.searchsorted(self._bins, bins)
        known = places < len(self._bins)
        known[known] = self._bins[places[known]] == bins[known]
        if known.all():
            return places
        self._bins = np.insert(self._bins, places[~known], bins[~known])
        self._moments = np.insert(self._moments, places[~known], 0, axis=1)
        return places + np.cumsum(~known) - ~known

    def _widen(self, low: float, high: float) -> None:
        self._low, self._high = min(self._low, low), max(self._high, high)

    @property
    def _finite(self) -> NDArray[np.bool_]:
        return (self._bins & (_SIGN - 1)) < _INFINITY

    def _parts(self) -> tuple[NDArray[Any], ...]:
        """Give counts, sums and square sums of low bits, bases and steps, in ascending order."""
        negative = np.flatnonzero(self._finite & (self._bins >= _SIGN))[::-1]
        order = np.append(negative, np.flatnonzero(self._finite & (self._bins < _SIGN)))
        bins = self._bins[order]
        bases = (bins << _LOW_BITS).view(np.float32).astype(np.float64)
        exponents = np.maximum(bins >> MANTISSA_BITS & 255, 1).astype(np.int64) - 150
        steps = np.ldexp(np.where(bins < _SIGN, 1.0, -1.0), exponents)
        counts, lows, squares = self._moments[:, order]
        return counts, lows, squares, bases, steps


def _moments(numbers: NDArray[np.float32]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Give the bins of numbers and their moments, as `cpu.moments` does."""
    patterns = np.sort(numbers.view(np.uint32))
    bins = patterns >> _LOW_BITS
    starts = np.flatnonzero(np.append(True, bins[1:] != bins[:-1]))
    low = (patterns & ((1 << _LOW_BITS) - 1)).astype(np.int64)
    moments = np.stack([
        np.diff(starts, append=len(bins)),
        np.add.reduceat(low, starts),
        np.add.reduceat(low * low, starts),
    ])  # fmt: skip
    return bins[starts].astype(np.uint32), moments.astype(np.int64)


def _is_state(bins: NDArray[Any], moments: NDArray[Any]) -> bool:
    """Tell whether bins and moments are valid, without a check of the limits of 64 bits."""
    if bins.dtype.kind not in "iu" or moments.dtype.kind not in "iu":
        return False
    places = bins.astype(np.int64)
    ascending = (np.diff(places) > 0).all() and (places >= 0).all() and (places < 2 * _SIGN).all()
    return bool(ascending and (moments >= 0).all())
