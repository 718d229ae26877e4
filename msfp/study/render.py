"""The page of a study: tables and plots of its records, and nothing that they do not hold."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from msfp.plots import errors_by_timestep
from msfp.report import png
from msfp.study.ladder import BITS, FULL_PRECISION, MODELS, RECIPES, SETTING, Row
from msfp.study.pictures import against_time, ladder_points, lines, strips
from msfp.study.run import picture_file
from msfp.study.statistics import Difference, Mean, compare, mean
from msfp.study.store import Record, Store
from msfp.study.subjects import SUBJECTS

INTRODUCTION = """# Results

Every number on this page is computed from the records in `results.jsonl` beside it, which hold
each row's settings, seeds, versions and machine. `msfp study` runs the rows and writes this page;
`msfp study --list` names those that are missing.

One seed stands for one whole run: its own calibration, trajectories, fine-tuning and noise. Tables
give means over seeds with 95% confidence intervals by Student's t. Rows of equal seeds are compared
in pairs with the recipe that they build on: the change of the noise-prediction error, tested on
its logarithm, and that of the paired PSNR. p-values of a table are adjusted for their number
(Benjamini and Hochberg, 1995); where p is 0.05 or more, or there are fewer than three pairs, the
cell says "tie".

- **noise error**: mean squared error of the denoiser's prediction on held-out full-precision
  trajectories, times 1000, mean over timesteps. The colour model predicts velocities (Salimans and
  Ho, 2022), the others the noise, which has variance 1.
- **PSNR, SSIM, SQNR**: of final images against those of the full-precision model from equal noise,
  by torchmetrics.
- **Frechet distance**: from real images, in the features of a small classifier. That of the full
  precision model moves with the seed of the noise; only what lies beyond it says something.
- **seconds**: of a CPU core, to quantize (search) and to fine-tune, and of one forward in emulation
  relative to full precision, on the machine named below each heading.
"""
CURVES = (
    "int-minmax", "int-mse", "nvfp4", "signed", "mixup", "matched", "lora", "talora-2",
    "branch-4", "branch-16", "branch-16-lora",
)  # fmt: skip
"""Recipes whose errors are drawn for each timestep."""
BITS_NOTE = """The first and the last layer have 8 bits, weights and inputs. In `all` they have 4
like all others, in `x8` their weights have 4 and their inputs 8.
"""
LADDER_NAMES = {SETTING[0], f"{SETTING[1]}-{SETTING[2]}", "training 0"}
"""What the ladder's own setting is called among others; its tests have a table of their own."""
SCALE = 1000
"""Noise errors are shown in thousandths."""


class Group:
    """Records of one model that the same table is about, by recipe."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.by_recipe: dict[str, dict[int, Record]] = defaultdict(dict)
        for record in records:
            self.by_recipe[record["row"]["recipe"]][record["row"]["seed"]] = record

    def recipes(self) -> list[str]:
        """Return the recipes that there are records of, in the ladder's order."""
        return [name for name in RECIPES if name in self.by_recipe]

    def quantized(self) -> list[str]:
        """Return all of them but full precision."""
        return [name for name in self.recipes() if name != FULL_PRECISION]

    def values(self, recipe: str, measure: str) -> dict[int, float]:
        """Return a measure by seed, where it was measured."""
        found = {}
        for seed, record in self.by_recipe[recipe].items():
            value = record.get(measure)
            if value is not None:
                found[seed] = value * SCALE if measure == "noise_error" else value
        return found

    def mean(self, recipe: str, measure: str) -> Mean | None:
        """Return the mean of a measure, None where it was not measured."""
        values = self.values(recipe, measure)
        return mean(list(values.values())) if values else None

    def seconds(self, recipe: str, stage: str) -> float:
        """Return the mean CPU seconds of a stage."""
        records = self.by_recipe[recipe].values()
        total: float = sum(record["seconds"][stage] for record in records)
        return total / len(records)

    def against(self, recipe: str) -> str | None:
        """Return the nearest that was run of the recipes that one builds on, or None."""
        found = RECIPES[recipe].against
        while found is not None and found not in self.by_recipe:
            found = RECIPES[found].against
        return found

    def tested(self, measure: str) -> dict[str, Difference]:
        """Compare every recipe with the one that it builds on, seeds in pairs."""
        pairs = {}
        for recipe in self.quantized():
            against = self.against(recipe)
            if against is not None:
                first, second = self.values(against, measure), self.values(recipe, measure)
                both = sorted(first.keys() & second.keys())
                pairs[recipe] = [
                    (_scale(first[s], measure), _scale(second[s], measure)) for s in both
                ]
        return compare(pairs)


def _scale(value: float, measure: str) -> float:
    """Return errors as logarithms, in which recipes differ by a factor."""
    return math.log(value) if measure == "noise_error" else value


def cell(value: Mean | None, digits: int) -> str:
    """Return a mean as a cell of a table."""
    return "" if value is None else value.text(digits)


def verdict(difference: Difference | None, measure: str) -> str:
    """Return what a test found as a cell of a table.

    Example:
        >>> verdict(Difference(-0.2, 0.001), "noise_error")
        '-18% (p = 0.001)'
        >>> verdict(Difference(0.1, 0.4), "psnr")
        'tie (p = 0.4)'
    """
    if difference is None:
        return ""
    if difference.p is None:
        return "tie (too few seeds)"
    p = "p < 0.001" if difference.p < 0.001 else f"p = {difference.p:.1g}"
    if difference.tie:
        return f"tie ({p})"
    if measure == "noise_error":
        return f"{100 * math.expm1(difference.change):+.0f}% ({p})"
    return f"{difference.change:+.1f} dB ({p})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, its first column text and the others numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def quality_table(group: Group) -> str:
    """Return the table of what all recipes give at one setting."""
    rows = [
        [
            RECIPES[recipe].label,
            cell(group.mean(recipe, "noise_error"), 2),
            cell(group.mean(recipe, "psnr"), 1),
            cell(group.mean(recipe, "ssim"), 3),
            cell(group.mean(recipe, "sqnr"), 1),
            cell(group.mean(recipe, "frechet"), 2),
            str(len(group.by_recipe[recipe])),
        ]
        for recipe in group.recipes()
    ]
    header = ("recipe", "noise error", "PSNR, dB", "SSIM", "SQNR, dB", "Frechet", "seeds")
    return markdown_table(header, rows) + _frechet_note(group)


def tests_table(group: Group) -> str:
    """Return the table of what each recipe changes against the one that it builds on."""
    error, psnr = group.tested("noise_error"), group.tested("psnr")
    rows = [
        [
            RECIPES[recipe].label,
            RECIPES[group.against(recipe) or ""].label,
            verdict(error[recipe], "noise_error"),
            verdict(psnr.get(recipe), "psnr"),
        ]
        for recipe in error
    ]
    return markdown_table(("recipe", "against", "noise error", "PSNR"), rows)


def cost_table(group: Group) -> str:
    """Return the table of what each recipe takes."""
    full = group.by_recipe.get(FULL_PRECISION)
    forward = group.seconds(FULL_PRECISION, "forward") if full else math.nan
    rows = []
    for recipe in group.recipes():
        size = next(iter(group.by_recipe[recipe].values()))["bytes"]
        rows.append([
            RECIPES[recipe].label,
            f"{size / 1000:.0f}",
            f"{group.seconds(recipe, 'quantize'):.1f}",
            f"{group.seconds(recipe, 'finetune'):.0f}",
            f"{group.seconds(recipe, 'forward') / forward:.1f}",
        ])  # fmt: skip
    return markdown_table(("recipe", "KB", "search, s", "tuning, s", "forward"), rows)


def _frechet_note(group: Group) -> str:
    """Return which recipes are within the seed noise of the full-precision Frechet distance."""
    if FULL_PRECISION not in group.by_recipe:
        return ""
    limit = max(group.values(FULL_PRECISION, "frechet").values())
    means = {recipe: group.mean(recipe, "frechet") for recipe in group.quantized()}
    within = [RECIPES[recipe].label for recipe, m in means.items() if m and m.value <= limit]
    return (
        f"\nFull precision reaches a Frechet distance of up to {limit:.2f} over "
        f"{len(group.by_recipe[FULL_PRECISION])} seeds; within it lie, by their means: "
        f"{', '.join(within) or 'none'}.\n"
    )


def settings_table(groups: Mapping[str, Group], measure: str, digits: int) -> str:
    """Return a table of one measure: settings across, and down the recipes of several of them."""
    counts = Counter(recipe for group in groups.values() for recipe in group.quantized())
    recipes = [recipe for recipe in RECIPES if counts[recipe] > 1]
    rows = [
        [RECIPES[recipe].label]
        + [cell(group.mean(recipe, measure), digits) for group in groups.values()]
        for recipe in recipes
    ]
    return markdown_table(["recipe", *groups], rows)


def settings_tests(groups: Mapping[str, Group], measure: str) -> str:
    """Return a table of what recipes change against those that they build on, settings across."""
    rows: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for setting, group in groups.items():
        for recipe, difference in group.tested(measure).items():
            if difference.p is not None:
                pair = recipe, group.against(recipe) or ""
                rows[pair][setting] = verdict(difference, measure)
    cells = [
        [RECIPES[recipe].label, RECIPES[against].label]
        + [found.get(setting, "") for setting in groups]
        for (recipe, against), found in rows.items()
    ]
    return markdown_table(["recipe", "against", *groups], cells)


class Page:
    """The page as it grows: Markdown, and plots in a folder beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts = folder, [INTRODUCTION]
        (folder / "plots").mkdir(parents=True, exist_ok=True)

    def add(self, text: str) -> None:
        """Add a block of Markdown."""
        self.parts.append(text)

    def add_plot(self, name: str, picture: Figure, caption: str) -> None:
        """Write a plot and show it."""
        (self.folder / "plots" / f"{name}.png").write_bytes(png(picture))
        self.parts.append(f"![{caption}](plots/{name}.png)\n\n{caption}\n")

    def write(self) -> Path:
        """Write the page and return its file."""
        file = self.folder / "results.md"
        file.write_text("\n".join(self.parts))
        return file


def render(folder: Path) -> Path:
    """Write `results.md` and `plots/` into the folder of a study; return the page's file."""
    records, page = list(Store(folder).records().values()), Page(folder)
    for model in MODELS:
        own = [record for record in records if record["row"]["model"] == model]
        if own:
            _add_model(page, model, own)
    return page.write()


def _add_model(page: Page, model: str, records: Sequence[Record]) -> None:
    """Add the sections of one reference model."""
    page.add(f"## {SUBJECTS[model].label}\n")
    page.add(_provenance(records))
    shipped = [record for record in records if record["row"]["training"] == 0]
    bits, sampler, steps = SETTING
    ladder = Group([record for record in shipped if _setting(record) == SETTING])
    if ladder.quantized():
        page.add(f"### The ladder: {bits}, {sampler}, {steps} steps\n")
        page.add(quality_table(ladder))
        page.add("Each against the recipe that it builds on:\n")
        page.add(tests_table(ladder))
        page.add("What it takes:\n")
        page.add(cost_table(ladder))
        _add_ladder_plots(page, model, ladder)
    by_bits = {
        width: Group([r for r in shipped if _setting(r) == (width, sampler, steps)])
        for width in BITS
    }
    _add_settings(page, model, "Bit widths", "bits", by_bits)
    samplers = sorted({_setting(r)[1:] for r in shipped if _setting(r)[0] == bits})
    by_sampler = {
        f"{name}-{count}": Group([r for r in shipped if _setting(r) == (bits, name, count)])
        for name, count in samplers
    }
    _add_settings(page, model, "Samplers and steps", "sampler-steps", by_sampler)
    trainings = sorted({record["row"]["training"] for record in records})
    at_setting = [record for record in records if _setting(record) == SETTING]
    by_training = {
        f"training {t}": Group([r for r in at_setting if r["row"]["training"] == t])
        for t in trainings
    }
    _add_settings(page, model, "Independently trained models", "training", by_training)


def _setting(record: Record) -> tuple[str, str, int]:
    """Return bits, sampler and steps of a record."""
    row = Row(**record["row"])
    return row.bits, row.sampler, row.steps


def _provenance(records: Sequence[Record]) -> str:
    """Return how much was taken of everything, and what ran it."""
    kinds = dict.fromkeys(
        ", ".join(f"{key} {value}" for key, value in record["versions"].items())
        for record in records
    )
    settings = dict.fromkeys(
        ", ".join(f"{value} {key}" for key, value in record["settings"].items())
        for record in records
    )
    return f"Each row: {'; '.join(settings)}. Run with {'; '.join(kinds)}.\n"


def _add_ladder_plots(page: Page, model: str, group: Group) -> None:
    """Add the plots of the ladder."""
    means = {recipe: group.mean(recipe, "noise_error") for recipe in group.quantized()}
    points = [
        (RECIPES[recipe].label, each, list(group.values(recipe, "noise_error").values()))
        for recipe, each in means.items()
        if each is not None
    ]
    page.add_plot(
        f"{model}-errors",
        ladder_points(points, "noise-prediction error x 1000"),
        "Noise-prediction error of each recipe: every seed, the mean and its 95% interval.",
    )
    timed = [
        (
            RECIPES[recipe].label,
            group.seconds(recipe, "quantize") + group.seconds(recipe, "finetune"),
            psnr,
        )
        for recipe in group.quantized()
        if (psnr := group.mean(recipe, "psnr")) is not None
    ]
    page.add_plot(
        f"{model}-time",
        against_time(timed, "paired PSNR, dB"),
        "Quality against time. Those with a name are better than all that take less time.",
    )
    firsts = {recipe: min(group.by_recipe[recipe].items())[1] for recipe in group.quantized()}
    curves = [
        (RECIPES[recipe].label, each["noise_errors"])
        for recipe, each in firsts.items()
        if recipe in CURVES
    ]
    page.add_plot(
        f"{model}-timesteps",
        errors_by_timestep(next(iter(firsts.values()))["timesteps"], curves),
        "Noise-prediction error of some recipes at each timestep, first seed.",
    )
    files = {
        recipe: picture_file(page.folder, group.by_recipe[recipe][0]["name"])
        for recipe in group.recipes()
        if 0 in group.by_recipe[recipe]
    }
    shown = [(RECIPES[recipe].label, file) for recipe, file in files.items() if file.exists()]
    if shown:
        page.add_plot(
            f"{model}-images", strips(shown), "Every column starts from the same noise, seed 0."
        )


def _add_settings(
    page: Page, model: str, heading: str, axis: str, groups: Mapping[str, Group]
) -> None:
    """Add the tables and the plot of recipes over settings, where there are several."""
    present = {name: group for name, group in groups.items() if group.quantized()}
    if len(present) < 2:
        return
    page.add(f"### {heading}\n")
    if axis == "bits":
        page.add(BITS_NOTE)
    page.add("Paired PSNR, dB:\n")
    page.add(settings_table(present, "psnr", 1))
    page.add("Noise error:\n")
    page.add(settings_table(present, "noise_error", 2))
    page.add("Each against the recipe that it builds on, noise error and PSNR:\n")
    others = {name: group for name, group in present.items() if name not in LADDER_NAMES}
    page.add(settings_tests(others, "noise_error"))
    page.add(settings_tests(others, "psnr"))
    series: dict[str, dict[str, Mean]] = defaultdict(dict)
    for name, group in present.items():
        for recipe in group.quantized():
            value = group.mean(recipe, "psnr")
            if value is not None:
                series[RECIPES[recipe].label][name] = value
    labels = [recipe.label for recipe in RECIPES.values()]
    followed = {label: series[label] for label in labels if len(series[label]) > 1}
    page.add_plot(
        f"{model}-{axis}",
        lines(followed, list(present), "paired PSNR, dB", axis),
        f"Paired PSNR by {axis}, with 95% intervals.",
    )
