"""The plots of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from msfp.experiments.study.statistics import Mean
from msfp.reports.figures import GREY, INK, STYLE, UNSIGNED, axes_of, colours, figure, name_row

MANY = 6
"""Number of settings above which their names do not fit side by side."""
NARROW = 6
"""Ratio of the ends of a logarithmic axis below which it has more ticks."""


Points = Sequence[tuple[str, Mean, Sequence[float]]]
"""Label, mean and replicates of each recipe."""


def recipe_points(parts: Mapping[str, Points], heading: str) -> Figure:
    """Draw the mean of each recipe with its interval, and every replicate, on log axes.

    Args:
        parts: Recipes by the title of their part; each part has its own axis.
        heading: Label of the horizontal axis.
    """
    sizes = [len(rows) + 1 for rows in parts.values()]
    picture = figure(7.6, 0.22 * sum(sizes) + 0.5 * len(parts) + 0.3)
    with mpl.rc_context(STYLE):
        grid = picture.subplots(len(parts), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (title, rows) in zip(grid, parts.items(), strict=True):
        for height, (_, mean, values) in enumerate(rows):
            axes.errorbar(mean.value, height, xerr=_interval(mean), color=UNSIGNED, capsize=3)
            axes.plot(mean.value, height, "|", color=UNSIGNED, markersize=12, markeredgewidth=2)
            axes.plot(values, [height] * len(values), "o", color=GREY, markersize=3)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.invert_yaxis()
        _log_axis(axes)
        axes.set_title(title, fontsize=10, loc="left")
    grid[-1].set_xlabel(heading)
    return picture


def _log_axis(axes: Axes) -> None:
    """Make the horizontal axis logarithmic, with ticks that suit its range."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    fine = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    axes.xaxis.set_major_locator(LogLocator(subs=fine if high / low < NARROW else (1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="both", color="#e4e7eb")
    axes.set_axisbelow(True)


def _interval(mean: Mean) -> list[list[float]]:
    """Return the margins of an interval below and above the mean, as matplotlib expects them."""
    return [[0.0 if np.isnan(each) else each] for each in mean.margins]


def lines(
    series: Mapping[str, Mapping[str, Mean]],
    shades: Mapping[str, str],
    names: Sequence[str],
    heading: str,
    xlabel: str,
    *,
    joined: bool,
) -> Figure:
    """Draw the mean of each recipe at each setting, with intervals.

    Args:
        series: Means by recipe and setting.
        shades: Colours by recipe.
        names: The settings from left to right.
        heading: Label of the vertical axis.
        xlabel: Label of the horizontal axis.
        joined: Whether to join by a line the settings whose names differ only after the last "-",
            such as a sampler's steps.
    """
    picture = figure(7.2, 3.8)
    axes = axes_of(picture)
    # The means set the height, because an interval of two or three seeds can be very wide.
    heights = [mean.value for means in series.values() for mean in means.values()]
    margin = 0.3 * (max(heights) - min(heights)) + 0.5
    bottom, top = min(heights) - margin, max(heights) + margin
    axes.set_ylim(bottom, top)
    families = [list(each) for _, each in groupby(names, lambda name: name.rpartition("-")[0])]
    for index, (label, means) in enumerate(series.items()):
        colour = shades[label]
        places = {name: i + 0.08 * (index - len(series) / 2) for i, name in enumerate(names)}
        for name, mean in means.items():
            axes.errorbar(places[name], mean.value, _interval(mean), capsize=3, color=colour)
            if mean.high > top:  # an arrow if an interval extends beyond the axes
                axes.plot(places[name], top, "^", markersize=6, color=colour, clip_on=False)
            if mean.low < bottom:
                axes.plot(places[name], bottom, "v", markersize=6, color=colour, clip_on=False)
        for members in families:
            known = [name for name in members if name in means]
            points = [places[name] for name in known], [means[name].value for name in known]
            axes.plot(*points, "o-" if joined else "o", markersize=5, linewidth=1, color=colour)
        axes.plot([], [], "o", color=colour, label=label)
    axes.set_xticks(range(len(names)), names)
    if len(names) > MANY:
        for text in axes.get_xticklabels():
            text.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(heading)
    axes.grid(axis="y", color="#e4e7eb")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture


@dataclass(frozen=True)
class Timed:
    """The quality of a recipe, and the time that it takes.

    Attributes:
        name: Text beside its point; may be empty.
        side: Side of the text: "above", "below", "left" or "right".
        kind: Kind of the recipe; each kind has its own colour.
        seconds: CPU seconds to quantize and fine-tune.
        mean: Mean of the quality.
    """

    name: str
    side: str
    kind: str
    seconds: float
    mean: Mean


def against_time(points: Sequence[Timed], heading: str) -> Figure:
    """Draw the mean of each recipe, with its interval, against the CPU seconds that it took.

    Args:
        points: The recipes.
        heading: Label of the vertical axis.
    """
    picture = figure(8.2, 4.4)
    axes = axes_of(picture)
    kinds = list(dict.fromkeys(point.kind for point in points))
    shades = dict(zip(kinds, colours(len(kinds)), strict=True))
    for point in points:
        at, colour = (point.seconds, point.mean.value), shades[point.kind]
        axes.errorbar(*at, _interval(point.mean), fmt="o", color=colour, markersize=5, alpha=0.5)
        if point.name:
            _name_point(axes, point)
    for kind, colour in shades.items():
        axes.plot([], [], "o", color=colour, label=kind)
    _log_axis(axes)
    heights = [point.mean.value for point in points]
    axes.set_ylim(min(heights) - 3, max(heights) + 5)
    axes.set_xlabel("CPU seconds to quantize and fine-tune")
    axes.set_ylabel(heading)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return picture


def _name_point(axes: Axes, point: Timed) -> None:
    """Write the name of a point beside the point, or beyond an end of its interval."""
    x, mean = point.seconds, point.mean
    at, shift, ha, va = {
        "above": ((x, np.fmax(mean.high, mean.value)), (0, 3), "center", "bottom"),
        "below": ((x, np.fmin(mean.low, mean.value)), (0, -3), "center", "top"),
        "left": ((x, mean.value), (-6, 0), "right", "center"),
        "right": ((x, mean.value), (6, 0), "left", "center"),
    }[point.side]
    axes.annotate(
        point.name, at, shift, textcoords="offset points", fontsize=8, color=INK, ha=ha, va=va
    )


def strips(rows: Sequence[tuple[str, Path]]) -> Figure:
    """Draw one labelled strip of images for each recipe; images of a column share their noise."""
    images = [mpl.image.imread(file) for _, file in rows]
    height, width = images[0].shape[:2]
    picture = figure(2.6 + 6.6, (6.6 * height / width + 0.06) * len(rows) + 0.1)
    with mpl.rc_context(STYLE):
        grid = picture.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (label, _), image in zip(grid, rows, images, strict=True):
        axes.imshow(image, interpolation="nearest")
        name_row(axes, label)
    return picture
