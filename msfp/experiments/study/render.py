"""The page of a study: tables and plots, computed from its records alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from msfp.experiments.study.ablation import (
    BITS,
    DEFAULT,
    FULL_PRECISION,
    MODELS,
    RECIPES,
    SETTING,
    Row,
)
from msfp.experiments.study.benchmark_models import BENCHMARK_MODELS
from msfp.experiments.study.groups import ERROR, Group
from msfp.experiments.study.pictures import Timed, against_time, lines, recipe_points, strips
from msfp.experiments.study.run import picture_file, valid_records
from msfp.experiments.study.statistics import Mean
from msfp.experiments.study.store import Record, Store
from msfp.experiments.study.tables import (
    cell,
    comparison_table,
    cost_table,
    distance_table,
    label,
    markdown_table,
    quality_table,
    settings_table,
    settings_tests,
)
from msfp.reports.figures import DISTINCT, GREY, INK, errors_by_timestep
from msfp.reports.html import png

INTRODUCTION = """# Results

Every number on this page is computed from the records in `results.jsonl` beside it, which hold
each row's settings, seeds and versions, and all but the oldest what machine and code ran it.
`msfp study` runs the rows and writes this page; with the folder of the records as its `--output`,
`--list` names those that are missing. Rows were measured before version 0.4, in which zero points
became whole numbers of steps: "Beyond the paper" says what that changes.
"""
READING = """## How to read the tables

**INT** are integers with a scale for each channel of the weights and one for the inputs, **MX** and
**NVFP4** blocks with a scale each, **signed** and **mixup-sign** floating point whose format is
searched layer by layer. The page "Beyond the paper" of the documentation explains GPTQ, matching,
splitting and low-rank branches, and "Fine-tuning" explains LoRAs, TALoRA, segments and DFA.
Refinement uses 64 samples unless the name of the recipe says how many. Recipes "(until 0.2.0)"
gained nothing, and their code is gone. So is that of two ideas without rows here: scales searched
by the error of the output, and exact calibration of the time layers ("Beyond the paper").

One seed stands for one whole run: its own calibration, trajectories, fine-tuning and noise. Tables
give means over seeds with 95% confidence intervals by Student's t; of errors geometric means, and
intervals of their logarithms. Rows of equal seeds are compared in pairs: the change, the 95%
interval of this comparison by itself, and the p-value of Student's paired t-test, adjusted for the
number of tests in the table (Benjamini and Hochberg, 1995).

- **bold**: p is below 0.05.
- **tie**: it is not, and the interval is within 5% of the error, or 1 dB.
- **inconclusive**: neither; more seeds are needed to tell.

What is measured:

- **noise error**: mean squared error of the denoiser's prediction on held-out full-precision
  trajectories, times 1000, mean over timesteps. The colour model predicts velocities (Salimans and
  Ho, 2022), the others the noise, which has variance 1. For the DiT it is the mean over both
  guidance branches.
- **PSNR, SSIM, SQNR**: of final images against those of the full-precision model from equal noise;
  PSNR and SSIM by torchmetrics. The squared error of PSNR is averaged over all images.
- **Frechet distance**: in the 64 features of a small classifier of the same kind of images. From
  real images (the 1797 digits, 4096 crops of photographs) it also falls below that of full
  precision, wherever an error undoes what guidance or the sampler did; the distance from samples of
  the full-precision model cannot be fooled so. Both are to be compared with full precision's own.
- **search, tuning**: CPU seconds of one thread to quantize and to fine-tune. **peak**: the peak
  memory of the process, including what it held before; the lowest value over seeds. **forward**:
  CPU time of one forward of the denoiser on the held-out rows. Products of 4-bit numbers are
  emulated in float32; the row of full precision is the real forward, and no CPU has kernels for
  4-bit ones to time.
"""
SHADES = {
    "int-mse": GREY,
    "nvfp4": DISTINCT[3],
    "mixup": DISTINCT[0],
    "matched": DISTINCT[5],
    "samples-256": DISTINCT[2],
    "lora": DISTINCT[4],
    "talora-2": DISTINCT[1],
    "samples-256-lora": INK,
}
"""Recipes in image strips and in plots over settings and timesteps, with their colours."""
BITS_NOTE = """The first and the last layer have 8 bits, weights and inputs. In `all` they have 4
like all others, in `x8` their weights have 4 and their inputs 8.
"""
SETTING_NAMES = {SETTING[0], f"{SETTING[1]}-{SETTING[2]}", "training 0"}
"""Names of the setting that all recipes are run at; the tests at it have their own table."""
UNTOLD = ("code", "date")
"""Keys whose values differ between records of one machine."""
SUMMARY = (
    "int-mse", "nvfp4", "mixup", "lora", "talora-2", "pure", "pure-rotated", "nvfp4-pure",
    "nvfp4_int4-pure", "samples-256", DEFAULT, "nvfp4-refined", "nvfp4_int4-refined",
)  # fmt: skip
"""Recipes of the table at the beginning of the page."""
NAMED = {
    "int-mse": ("INT, clip", "below"),
    "nvfp4": ("NVFP4", "above"),
    "mixup": ("mixup-sign", "below"),
    "gptq": ("GPTQ", "left"),
    "lora": ("LoRA", "below"),
    "long-lora": ("LoRA, 640 steps", "below"),
    "branch-4": ("low-rank branch of rank 4", "left"),
    DEFAULT: ("default", "above"),
}
"""Labels of some recipes in the plot over time, and the side of the point for each label."""


class Page:
    """A page in Markdown, with its plots in a folder beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts = folder, [INTRODUCTION]
        (folder / "plots").mkdir(parents=True, exist_ok=True)

    def add(self, text: str) -> None:
        """Add a block of Markdown."""
        self.parts.append(text)

    def add_plot(self, name: str, picture: Figure, caption: str) -> None:
        """Write a plot to a file, and add it to the page."""
        (self.folder / "plots" / f"{name}.png").write_bytes(png(picture))
        self.parts.append(f"![{caption}](plots/{name}.png)\n\n{caption}\n")

    def write(self) -> Path:
        """Write the page and return its file."""
        file = self.folder / "results.md"
        file.write_text("\n".join(self.parts))
        return file


def render(folder: Path) -> Path:
    """Write `results.md` and `plots/` into the folder of a study; return the page's file."""
    records, page = valid_records(Store(folder)), Page(folder)
    of_models = {
        model: [record for record in records if record["row"]["model"] == model] for model in MODELS
    }
    of_models = {model: own for model, own in of_models.items() if own}
    page.add(_summary(of_models))
    page.add(READING)
    for model, own in of_models.items():
        _add_model(page, model, own)
    return page.write()


def _at_setting(records: Sequence[Record]) -> Group:
    """Return the records of the shipped model at the setting of all recipes."""
    shipped = [record for record in records if record["row"]["training"] == 0]
    return Group([record for record in shipped if _setting(record) == SETTING])


def _summary(of_models: Mapping[str, Sequence[Record]]) -> str:
    """Return the first table of the page: paired PSNR of some recipes, a column for each model."""
    groups = {BENCHMARK_MODELS[model].label: _at_setting(own) for model, own in of_models.items()}
    rows = [
        [label(recipe)] + [cell(each.mean(recipe, "psnr"), 1) for each in groups.values()]
        for recipe in SUMMARY
        if any(recipe in each.by_recipe for each in groups.values())
    ]
    bits, sampler, steps = SETTING
    return (
        f"Paired PSNR in dB at {bits}, {sampler}, {steps} steps. {label(DEFAULT)} is that of "
        "`msfp quantize`: floating point with mixed signs, weights matched and rounded by GPTQ, "
        "split inputs, rotated inputs where that pays, low-rank branches of rank 16 that weigh "
        "columns by the inputs (in 8 bits beside convolutions), and 256 samples.\n\n"
    ) + markdown_table(("recipe", *groups), rows)


def _add_model(page: Page, model: str, records: Sequence[Record]) -> None:
    """Add the sections of one reference model."""
    page.add(f"## {BENCHMARK_MODELS[model].label}\n")
    page.add(_provenance(records))
    shipped = [record for record in records if record["row"]["training"] == 0]
    bits, sampler, steps = SETTING
    group = _at_setting(records)
    if group.quantized():
        page.add(f"### All recipes: {bits}, {sampler}, {steps} steps\n")
        page.add(quality_table(group))
        page.add("Each against what it builds on, and some against one LoRA or plain rounding:\n")
        page.add(comparison_table(group))
        page.add("Frechet distances, and how they differ from full precision's at equal noise:\n")
        page.add(distance_table(group))
        page.add("What it takes:\n")
        page.add(cost_table(group))
        _add_plots(page, model, group)
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
    """Return a sentence on the settings of the rows, and on the versions and machine."""
    kinds = dict.fromkeys(
        ", ".join(
            f"{key} {value}" for key, value in record["versions"].items() if key not in UNTOLD
        )
        for record in records
    )
    settings = dict.fromkeys(
        ", ".join(f"{value} {key}" for key, value in record["settings"].items())
        for record in records
    )
    return f"Each row: {'; '.join(settings)}. Run with {'; '.join(kinds)}.\n"


def _add_plots(page: Page, model: str, group: Group) -> None:
    """Add the plots of all recipes."""
    means = {recipe: group.mean(recipe, ERROR) for recipe in group.quantized()}
    points: dict[str, list[tuple[str, Mean, list[float]]]] = defaultdict(list)
    for recipe, each in means.items():
        if each is not None:
            values = list(group.values(recipe, ERROR).values())
            points[_kind(recipe)].append((RECIPES[recipe].title, each, values))
    page.add_plot(
        f"{model}-errors",
        recipe_points(points, "error of the prediction x 1000"),
        "Error of the prediction by recipe: every seed, the geometric mean and its 95% interval. "
        "Each part has its own axis.",
    )
    page.add_plot(
        f"{model}-time",
        against_time(_timed(group), "paired PSNR, dB"),
        "Quality against CPU seconds to quantize and fine-tune, with 95% intervals.",
    )
    firsts = {recipe: group.first(recipe) for recipe in group.quantized()}
    curves = [
        (RECIPES[recipe].title, each["noise_errors"])
        for recipe, each in firsts.items()
        if recipe in SHADES
    ]
    if curves:
        shades = [SHADES[recipe] for recipe in firsts if recipe in SHADES]
        page.add_plot(
            f"{model}-timesteps",
            errors_by_timestep(next(iter(firsts.values()))["timesteps"], curves, shades),
            "Error of the prediction of some recipes at each timestep, first seed.",
        )
    files = {
        recipe: picture_file(page.folder, group.by_recipe[recipe][0]["name"])
        for recipe in group.recipes()
        if 0 in group.by_recipe[recipe] and recipe in (FULL_PRECISION, *SHADES)
    }
    shown = [(RECIPES[recipe].title, file) for recipe, file in files.items() if file.exists()]
    if shown:
        page.add_plot(
            f"{model}-images", strips(shown), "Every column starts from the same noise, seed 0."
        )


def _timed(group: Group) -> list[Timed]:
    """Return the quality and the time of each recipe."""
    found = []
    for recipe in group.quantized():
        psnr = group.mean(recipe, "psnr")
        seconds = [group.seconds(recipe, stage) or 0.0 for stage in ("quantize", "finetune")]
        if psnr is not None:
            found.append(Timed(*NAMED.get(recipe, ("", "")), _kind(recipe), sum(seconds), psnr))
    return found


def _kind(recipe: str) -> str:
    """Return the kind of a recipe: which stages follow the search."""
    quantization, finetune = RECIPES[recipe].quantization or {}, RECIPES[recipe].finetune
    refined = quantization.get("refine") is not None
    if finetune is not None:
        return "refined and fine-tuned" if refined else "fine-tuned"
    return "refined" if refined else "search alone"


def _add_settings(
    page: Page, model: str, heading: str, axis: str, groups: Mapping[str, Group]
) -> None:
    """Add the tables and the plot of recipes over settings, if there are several settings."""
    present = {name: group for name, group in groups.items() if group.quantized()}
    if len(present) < 2:
        return
    page.add(f"### {heading}\n")
    if axis == "bits":
        page.add(BITS_NOTE)
    page.add("Paired PSNR, dB:\n")
    page.add(settings_table(present, "psnr", 1))
    page.add("Noise error:\n")
    page.add(settings_table(present, ERROR, 2))
    page.add("Frechet distance from real images:\n")
    page.add(settings_table(present, "frechet", 2))
    page.add("Each against what it builds on:\n")
    others = {name: group for name, group in present.items() if name not in SETTING_NAMES}
    page.add(settings_tests(others))
    series: dict[str, dict[str, Mean]] = defaultdict(dict)
    for recipe in SHADES:
        for name, group in present.items():
            value = group.mean(recipe, "psnr")
            if value is not None:
                series[recipe][name] = value
    followed = {RECIPES[recipe].title: means for recipe, means in series.items() if len(means) > 1}
    shades = {RECIPES[recipe].title: shade for recipe, shade in SHADES.items()}
    joined = axis == "sampler-steps"
    page.add_plot(
        f"{model}-{axis}",
        lines(followed, shades, list(present), "paired PSNR, dB", axis, joined=joined),
        f"Paired PSNR by {axis}, with 95% intervals.",
    )
