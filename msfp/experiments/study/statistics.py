"""Means with confidence intervals, and paired tests with "tie" as a possible verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from scipy import stats

CONFIDENCE = 0.95
MIN_PAIRS = 3
"""The smallest number of pairs that is tested."""
Key = TypeVar("Key", bound=Hashable)
Verdict = Literal["different", "tie", "inconclusive", "identical", "few"]


@dataclass(frozen=True)
class Mean:
    """A mean over replicates.

    Attributes:
        value: The mean.
        low: Lower end of its confidence interval by Student's t; NaN for one replicate.
        high: Upper end.
        count: Replicates.
    """

    value: float
    low: float
    high: float
    count: int

    def text(self, digits: int) -> str:
        """Return the mean with its margin, or with its interval if that is not symmetric.

        Example:
            >>> mean([1.0, 2.0, 3.0]).text(1)
            '2.0 ± 2.5'
            >>> geometric_mean([1.0, 2.0, 4.0]).text(1)
            '2.0 [0.4, 11.2]'
        """
        value = f"{self.value:.{digits}f}"
        if math.isnan(self.low):
            return value
        below, above = self.margins
        if math.isclose(below, above):
            return f"{value} ± {above:.{digits}f}"
        return f"{value} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    @property
    def margins(self) -> tuple[float, float]:
        """How far the interval reaches below and above the mean."""
        return self.value - self.low, self.high - self.value


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of replicates with its 95% confidence interval."""
    value, count = statistics.mean(values), len(values)
    if count < 2:
        return Mean(value, math.nan, math.nan, count)
    margin = _margin(values)
    return Mean(value, value - margin, value + margin, count)


def geometric_mean(values: Sequence[float]) -> Mean:
    """Return the geometric mean of positive replicates, and the interval of their logarithms."""
    logarithms = mean([math.log(value) for value in values])
    value, low, high = map(math.exp, (logarithms.value, logarithms.low, logarithms.high))
    return Mean(value, low, high, logarithms.count)


def _margin(values: Sequence[float]) -> float:
    """Return half the width of the confidence interval of the mean of at least two values."""
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Difference:
    """A paired comparison of one measure.

    Attributes:
        change: Mean of the differences, second minus first.
        low: Lower end of its confidence interval, not adjusted for other comparisons; NaN for one
            pair.
        high: Upper end.
        p: The p-value of Student's paired t-test, adjusted for the other tests of its family; None
            for too few pairs.
        count: Pairs.
    """

    change: float
    low: float
    high: float
    p: float | None
    count: int

    @property
    def is_identical(self) -> bool:
        """Whether all pairs are equal."""
        return self.change == self.low == self.high == 0

    def is_within(self, margin: float) -> bool:
        """Return whether the whole interval is within a margin in either direction."""
        return -margin <= self.low and self.high <= margin

    def is_outside(self, margin: float) -> bool:
        """Return whether the whole interval is beyond a margin, in one direction."""
        return self.low > margin or self.high < -margin

    def verdict(self, margin: float) -> Verdict:
        """Return the verdict of the test.

        A difference that is not significant is a "tie" if the whole interval is within the margin.
        Otherwise it is "inconclusive".

        Args:
            margin: The largest negligible change.
        """
        if self.p is None:
            return "few"
        if self.is_identical:
            return "identical"
        if self.p < 1 - CONFIDENCE:
            return "different"
        return "tie" if self.is_within(margin) else "inconclusive"


def compare(pairs: Mapping[Key, Sequence[tuple[float, float]]]) -> dict[Key, Difference]:
    """Test the pairs of (first, second) values of each comparison in a family for a difference.

    p-values are adjusted for the number of comparisons (Benjamini and Hochberg, 1995): 5% of the
    differences that are found may be expected to be false. A comparison whose pairs are all equal
    does not count.

    Args:
        pairs: The values of equal seeds, by comparison; comparisons without pairs are left out.

    Example:
        >>> found = compare({"b": [(1.0, 2.0), (2.0, 3.1), (3.0, 3.9)], "c": [(1.0, 1.1)]})
        >>> found["b"].verdict(0.1), found["c"].verdict(0.1)
        ('different', 'few')
    """
    found = {name: _difference(each) for name, each in pairs.items() if each}
    family = {name: each for name, each in found.items() if not each.is_identical}
    raw = {name: each.p for name, each in family.items() if each.p is not None}
    adjusted = stats.false_discovery_control(list(raw.values())) if raw else []
    p = {name: float(value) for name, value in zip(raw, adjusted, strict=True)}
    return {name: replace(each, p=p.get(name, each.p)) for name, each in found.items()}


def _difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Return the change with its interval, and the p-value of this test alone."""
    changes = [second - first for first, second in pairs]
    change = mean(changes)
    if len(pairs) < MIN_PAIRS:
        return Difference(change.value, change.low, change.high, None, len(pairs))
    if math.isclose(min(changes), max(changes)):  # the test would divide by 0
        p = float(change.value == 0)
        return Difference(change.value, change.value, change.value, p, len(pairs))
    p = float(stats.ttest_1samp(changes, 0.0).pvalue)
    return Difference(change.value, change.low, change.high, p, len(pairs))
