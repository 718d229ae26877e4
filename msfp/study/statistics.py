"""Means with confidence intervals, and paired tests that may say "tie"."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95
MIN_PAIRS = 3
"""Fewer pairs are not tested."""


@dataclass(frozen=True)
class Mean:
    """A mean over replicates.

    Attributes:
        value: The mean.
        margin: Half of the width of its confidence interval by Student's t; NaN for one replicate.
        count: Replicates.
    """

    value: float
    margin: float
    count: int

    def text(self, digits: int) -> str:
        """Return it with its margin, rounded.

        Example:
            >>> mean([1.0, 2.0, 3.0]).text(1)
            '2.0 ± 2.5'
        """
        margin = "" if math.isnan(self.margin) else f" ± {self.margin:.{digits}f}"
        return f"{self.value:.{digits}f}{margin}"


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of replicates with its 95% confidence interval."""
    count = len(values)
    if count < 2:
        return Mean(values[0], math.nan, count)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    margin = quantile * statistics.stdev(values) / math.sqrt(count)
    return Mean(statistics.mean(values), margin, count)


@dataclass(frozen=True)
class Difference:
    """A paired comparison of one measure.

    Attributes:
        change: Mean of the differences, second less first.
        p: Of Student's paired t-test, adjusted for the others of its family; None where there are
            too few pairs.
    """

    change: float
    p: float | None

    @property
    def tie(self) -> bool:
        """Whether the test does not tell the two apart."""
        return self.p is None or not self.p < 1 - CONFIDENCE


def compare(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Difference]:
    """Test every family member's pairs of (first, second) values for a difference.

    p-values are adjusted for the number of comparisons (Benjamini and Hochberg, 1995): of those
    called different, 5% may be expected to be ties.

    Args:
        pairs: By comparison, the values of equal seeds.

    Example:
        >>> found = compare({"b": [(1.0, 2.0), (2.0, 3.1), (3.0, 3.9)], "c": [(1.0, 1.1)]})
        >>> found["b"].tie, found["c"].p
        (False, None)
    """
    tested = {name: each for name, each in pairs.items() if _testable(each)}
    raw = [float(stats.ttest_rel(*zip(*each, strict=True)).pvalue) for each in tested.values()]
    adjusted = stats.false_discovery_control(raw) if raw else []
    p = {name: float(value) for name, value in zip(tested, adjusted, strict=True)}
    return {
        name: Difference(statistics.mean(b - a for a, b in each), p.get(name))
        for name, each in pairs.items()
        if each
    }


def _testable(pairs: Sequence[tuple[float, float]]) -> bool:
    """Return whether there are enough pairs, and they do not all differ by the same."""
    return len(pairs) >= MIN_PAIRS and len({b - a for a, b in pairs}) > 1
