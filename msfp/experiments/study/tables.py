"""Tables of a study in Markdown."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from msfp.experiments.study.ablation import DEFAULT, FULL_PRECISION, RECIPES
from msfp.experiments.study.groups import ERROR, Group, comparisons
from msfp.experiments.study.statistics import MIN_PAIRS, Difference, Mean
from msfp.experiments.study.store import Record

MARGINS = {ERROR: math.log(1.05), "psnr": 1.0}
"""The largest negligible changes: 5% of the error, 1 dB."""
DISTANCES = {
    "frechet": "real images",
    "frechet_sampled": "images of the full-precision model from other noise",
}
"""The images that each Frechet distance is measured from, by measure."""


def label(recipe: str) -> str:
    """Return the name of a recipe in tables."""
    title = RECIPES[recipe].title
    return f"**{title}**" if recipe == DEFAULT else title


def cell(value: Mean | None, digits: int) -> str:
    """Return a mean as a cell of a table."""
    return "" if value is None else value.text(digits)


def verdict(difference: Difference | None, measure: str) -> str:
    """Return the result of a test as a cell of a table.

    Example:
        >>> verdict(Difference(-0.2, -0.3, -0.1, 0.001, 5), "noise_error")
        '**-18%** [-26, -10], p = 0.001'
        >>> verdict(Difference(0.1, -0.2, 0.4, 0.4, 5), "psnr")
        'tie: +0.1 dB [-0.2, +0.4]'
        >>> verdict(Difference(0.7, 0.1, 1.3, 0.047, 5), "psnr")
        '**+0.7 dB** [+0.1, +1.3], p = 0.047'
    """
    if difference is None:
        return ""
    kind = difference.verdict(MARGINS[measure])
    if kind == "identical":
        return kind
    if kind == "few":
        return f"few seeds: {_shown(difference.change, measure)}{_unit(measure)}"
    low, high = _shown(difference.low, measure), _shown(difference.high, measure)
    change, interval = _shown(difference.change, measure) + _unit(measure), f"[{low}, {high}]"
    if kind == "tie":
        return f"tie: {change} {interval}"
    p = difference.p or 0.0
    digits = 3 if f"{p:.1g}" == "0.05" else 1  # shows the side of the threshold
    note = "p < 0.001" if p < 0.001 else f"p = {p:.{digits}g}"
    if kind == "inconclusive":
        return f"inconclusive: {change} {interval}, {note}"
    return f"**{change}** {interval}, {note}"


def _shown(change: float, measure: str) -> str:
    if measure == ERROR:
        return f"{100 * math.expm1(change):+.0f}"
    return f"{change:+.1f}"


def _unit(measure: str) -> str:
    return "%" if measure == ERROR else " dB"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def quality_table(group: Group) -> str:
    """Return the table of the quality of all recipes at one setting."""
    rows = [
        [
            label(recipe),
            cell(group.mean(recipe, ERROR), 2),
            cell(group.mean(recipe, "psnr"), 1),
            cell(group.mean(recipe, "ssim"), 3),
            cell(group.mean(recipe, "sqnr"), 1),
            str(len(group.by_recipe[recipe])),
        ]
        for recipe in group.recipes()
    ]
    return markdown_table(("recipe", "noise error", "PSNR, dB", "SSIM", "SQNR, dB", "seeds"), rows)


def distance_table(group: Group) -> str:
    """Return the table of Frechet distances, and of their change from full precision."""
    measures = [each for each in DISTANCES if group.mean(FULL_PRECISION, each) is not None]
    changes = {measure: group.beside_full_precision(measure) for measure in measures}
    rows = []
    for recipe in group.recipes():
        cells = [label(recipe)]
        for measure in measures:
            change = changes[measure].get(recipe)
            cells += [cell(group.mean(recipe, measure), 2), _change(change)]
        rows.append(cells)
    header = [text for each in measures for text in (f"from {DISTANCES[each]}", "change")]
    notes = "".join(_distance_note(group, measure, changes[measure]) for measure in measures)
    return markdown_table(["recipe", *header], rows) + notes if measures else ""


def _change(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if math.isnan(difference.low):
        return f"{difference.change:+.2f}"
    return f"{difference.change:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def _distance_note(group: Group, measure: str, changes: Mapping[str, Difference]) -> str:
    """Return a note on recipes that change a distance by less than another noise seed does."""
    full = list(group.values(FULL_PRECISION, measure).values())
    if len(full) < MIN_PAIRS:
        return ""
    spread = statistics.stdev(full)
    tested = {label(name): each for name, each in changes.items() if each.count >= MIN_PAIRS}
    inside = [name for name, each in tested.items() if each.is_within(spread)]
    outside = [name for name, each in tested.items() if each.is_outside(spread)]
    return (
        f"\nFrom {DISTANCES[measure]}: over {len(full)} seeds the distance of full precision has a "
        f"standard deviation of {spread:.2f}. The whole interval of the change is smaller, in "
        f"either direction, for: {'; '.join(inside) or 'none'}. It is larger for: "
        f"{'; '.join(outside) or 'none'}. For the others, this number of seeds is inconclusive.\n"
    )


def comparison_table(group: Group) -> str:
    """Return the table of tests of each recipe against others: changes of error and PSNR."""
    found = comparisons({"": group}, (ERROR, "psnr"))
    pairs = dict.fromkeys((recipe, against) for recipe, against, _, _ in found)
    rows = []
    for recipe, against in pairs:
        tests = {each: found.get((recipe, against, "", each)) for each in (ERROR, "psnr")}
        count = max(each.count for each in tests.values() if each is not None)
        cells = [verdict(each, measure) for measure, each in tests.items()]
        rows.append([label(recipe), label(against), *cells, str(count)])
    return markdown_table(("recipe", "against", "noise error", "PSNR", "pairs"), rows)


def cost_table(group: Group) -> str:
    """Return the table of the costs of each recipe: size, time and memory."""
    rows, earlier = [], False
    for recipe in group.recipes():
        mark = " *" if any(map(_is_uncompiled, group.timed(recipe))) else ""
        earlier = earlier or bool(mark)
        file, peak = (group.smallest(recipe, of) for of in (_file, _peak))
        rows.append(
            [
                label(recipe),
                f"{group.first(recipe)['bytes'] / 1000:.0f}",
                f"{file / 1000:.0f}" if file else "",
                f"{group.seconds(recipe, 'quantize') or 0.0:.1f}",
                f"{group.seconds(recipe, 'finetune') or 0.0:.0f}{mark}",
                f"{peak / 1e6:.0f}" if peak else "",
                f"{1000 * (group.seconds(recipe, 'forward') or math.nan):.0f}",
            ]
        )
    header = (
        "recipe", "tensors, KB", "files, KB", "search, s", "tuning, s", "peak, MB", "forward, ms",
    )  # fmt: skip
    note = "\n\\* timed before gradients were compiled; compiled gradients take less time.\n"
    return markdown_table(header, rows) + (note if earlier else "") + _shared_note(group)


def _is_uncompiled(record: Record) -> bool:
    """Return whether a record is of training by earlier code, without compiled gradients."""
    tuning = record.get("finetune")
    return tuning is not None and "shard" not in tuning  # a setting that was added with them


def _file(record: Record) -> float | None:
    return record.get("file_bytes")


def _peak(record: Record) -> float | None:
    """Return the largest peak memory of all stages, None if unknown."""
    return max((each for each in record.get("peak_bytes", {}).values() if each), default=None)


def _shared_note(group: Group) -> str:
    """Return a note on the stages that rows of a seed share, and on their time."""
    stages = {
        "calibrate": "calibration (all quantized rows)",
        "record": "recording the trajectories to train on (all refined or fine-tuned rows)",
    }
    times: dict[str, float] = {}
    for stage, name in stages.items():
        found = [group.seconds(recipe, stage) for recipe in group.quantized()]
        if known := [seconds for seconds in found if seconds is not None]:
            times[name] = statistics.mean(known)
    if not times:
        return ""
    told = " and ".join(f"{seconds:.0f} s for {name}" for name, seconds in times.items())
    return f"\nShared by the rows of a seed and not included above: {told}.\n"


def settings_table(groups: Mapping[str, Group], measure: str, digits: int) -> str:
    """Return a table of one measure: a column for each setting, rows of recipes at several."""
    counts = Counter(recipe for group in groups.values() for recipe in group.quantized())
    several = {recipe for recipe in RECIPES if counts[recipe] > 1}
    if measure in DISTANCES:  # needs that of full precision for reference
        several |= {FULL_PRECISION}
    recipes = [recipe for recipe in RECIPES if recipe in several]
    rows = [
        [label(recipe)] + [cell(group.mean(recipe, measure), digits) for group in groups.values()]
        for recipe in recipes
    ]
    return markdown_table(["recipe", *groups], rows)


def settings_tests(groups: Mapping[str, Group]) -> str:
    """Return a table of tests of recipes against others, one family; a column for each setting."""
    found = comparisons(groups, tuple(MARGINS))
    told = {key: each for key, each in found.items() if each.p is not None}
    rows = [
        [label(recipe), label(against), "error" if measure == ERROR else "PSNR"]
        + [verdict(told.get((recipe, against, each, measure)), measure) for each in groups]
        for recipe, against, measure in dict.fromkeys(
            (recipe, against, measure) for recipe, against, _, measure in told
        )
    ]
    return markdown_table(["recipe", "against", "of", *groups], rows)
