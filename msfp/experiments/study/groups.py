"""Records of one model and setting, by recipe: their measures, and tests between recipes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from msfp.experiments.study.ablation import FULL_PRECISION, RECIPES
from msfp.experiments.study.statistics import Difference, Mean, compare, geometric_mean, mean
from msfp.experiments.study.store import Record

ERROR = "noise_error"
SCALE = 1000
"""Noise errors are shown times 1000."""


class Group:
    """Records of one model for one table, by recipe."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.by_recipe: dict[str, dict[int, Record]] = defaultdict(dict)
        for record in records:
            self.by_recipe[record["row"]["recipe"]][record["row"]["seed"]] = record

    def recipes(self) -> list[str]:
        """Return the recipes that have records, in the order of `RECIPES`."""
        return [name for name in RECIPES if name in self.by_recipe]

    def quantized(self) -> list[str]:
        """Return the recipes that have records, without full precision."""
        return [name for name in self.recipes() if name != FULL_PRECISION]

    def first(self, recipe: str) -> Record:
        """Return the record of the lowest seed."""
        return min(self.by_recipe[recipe].items())[1]

    def values(self, recipe: str, measure: str) -> dict[int, float]:
        """Return a measure by seed, for the seeds with a value."""
        if recipe not in self.by_recipe:
            return {}
        found = {
            seed: record[measure]
            for seed, record in self.by_recipe[recipe].items()
            if record.get(measure) is not None
        }
        scale = SCALE if measure == ERROR else 1
        return {seed: scale * value for seed, value in found.items()}

    def mean(self, recipe: str, measure: str) -> Mean | None:
        """Return the mean of a measure, for errors the geometric mean; None without values."""
        values = list(self.values(recipe, measure).values())
        if not values:
            return None
        return geometric_mean(values) if measure == ERROR else mean(values)

    def timed(self, recipe: str) -> list[Record]:
        """Return the records whose times are comparable, or all records if none are.

        Records without a hash of the code are of earlier code, which was slower.
        """
        records = list(self.by_recipe[recipe].values())
        return [each for each in records if "code" in each["versions"]] or records

    def seconds(self, recipe: str, stage: str) -> float | None:
        """Return the mean CPU seconds of a stage, None where it was not timed."""
        found = [each["seconds"].get(stage) for each in self.timed(recipe)]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) / len(known) if known else None

    def smallest(self, recipe: str, measure: Callable[[Record], float | None]) -> float | None:
        """Return the smallest value of a measure in the records, None if no record has it."""
        found = [measure(record) for record in self.by_recipe[recipe].values()]
        return min((each for each in found if each), default=None)

    def against(self, recipe: str) -> list[str]:
        """Return the recipes that a recipe is tested against.

        If the recipe that it extends has no records, the recipe that this one extends takes its
        place, and so on.
        """
        found, *others = RECIPES[recipe].against or ("",)
        while found and found not in self.by_recipe:
            found = (*RECIPES[found].against, "")[0]
        return [each for each in dict.fromkeys((found, *others)) if each in self.by_recipe]

    def pairs(self, first: str, second: str, measure: str) -> list[tuple[float, float]]:
        """Return pairs of a measure of two recipes at equal seeds; errors as logarithms."""
        one, other = self.values(first, measure), self.values(second, measure)
        both = [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]
        if measure != ERROR:
            return both
        return [(math.log(a), math.log(b)) for a, b in both]

    def beside_full_precision(self, measure: str) -> dict[str, Difference]:
        """Compare every recipe's measure with that of full precision from equal noise."""
        found = {each: self.pairs(FULL_PRECISION, each, measure) for each in self.quantized()}
        return compare(found)


Comparison = tuple[str, str, str, str]
"""A recipe, the recipe that it is tested against, the setting, and the measure."""


def comparisons(
    groups: Mapping[str, Group], measures: Sequence[str]
) -> dict[Comparison, Difference]:
    """Compare every recipe with those that it is tested against, in pairs of equal seeds.

    All comparisons together are one family of tests.

    Args:
        groups: Groups by setting.
        measures: Measures to compare.
    """
    return compare(
        {
            (recipe, against, setting, measure): group.pairs(against, recipe, measure)
            for setting, group in groups.items()
            for recipe in group.quantized()
            for against in group.against(recipe)
            for measure in measures
        }
    )
