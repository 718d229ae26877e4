"""Plots of a study, one for each question."""

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

from msfp.plots import GREY, INK, STYLE, UNSIGNED, axes_of, colours, figure, name_row
from msfp.study.statistics import Mean

MANY = 6
"""Settings of which the names do not fit side by side."""


def ladder_points(rows: Sequence[tuple[str, Mean, Sequence[float]]], heading: str) -> Figure:
    """Draw the mean of each recipe with its interval, and every replicate, on a log axis."""
    picture = figure(7.2, 0.36 * len(rows) + 0.9)
    axes = axes_of(picture)
    for height, (_, mean, values) in enumerate(rows):
        axes.plot(values, [height] * len(values), "o", color=GREY, markersize=4)
        axes.errorbar(mean.value, height, xerr=_interval(mean), fmt="o", color=UNSIGNED, capsize=3)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.invert_yaxis()
    _log_axis(axes)
    axes.set_xlabel(heading)
    return picture


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="both", color="#e4e7eb")
    axes.set_axisbelow(True)


def _interval(mean: Mean) -> list[list[float]]:
    """Return how far an interval reaches below and above the mean, as matplotlib takes it."""
    return [[0.0 if np.isnan(each) else each] for each in mean.margins]


def lines(
    series: Mapping[str, Mapping[str, Mean]],
    names: Sequence[str],
    heading: str,
    xlabel: str,
    *,
    joined: bool,
) -> Figure:
    """Draw the mean of each recipe at each setting, with intervals.

    Args:
        series: Means by recipe and setting.
        names: The settings from left to right.
        heading: What the height is.
        xlabel: What the settings are.
        joined: Whether to join by a line those settings that differ after the last "-" alone, such
            as a sampler's steps.
    """
    picture = figure(7.2, 3.8)
    axes = axes_of(picture)
    # The means rule the height: an interval of two or three seeds may be as wide as it likes.
    heights = [mean.value for means in series.values() for mean in means.values()]
    margin = 0.3 * (max(heights) - min(heights)) + 0.5
    bottom, top = min(heights) - margin, max(heights) + margin
    axes.set_ylim(bottom, top)
    families = [list(each) for _, each in groupby(names, lambda name: name.rpartition("-")[0])]
    for index, (label, means) in enumerate(series.items()):
        colour = colours(len(series))[index]
        places = {name: i + 0.08 * (index - len(series) / 2) for i, name in enumerate(names)}
        for name, mean in means.items():
            axes.errorbar(places[name], mean.value, _interval(mean), capsize=3, color=colour)
            if mean.high > top:  # an arrow where an interval goes on outside
                axes.plot(places[name], top, "^", markersize=6, color=colour, clip_on=False)
            if mean.low < bottom:
                axes.plot(places[name], bottom, "v", markersize=6, color=colour, clip_on=False)
        for members in families:
            known = [name for name in members if name in means]
            points = [places[name] for name in known], [means[name].value for name in known]
            axes.plot(*points, "o-" if joined else "o", markersize=5, linewidth=1, color=colour)
        axes.plot([], [], "o", color=colour, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", rotation=40 if len(names) > MANY else 0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(heading)
    axes.grid(axis="y", color="#e4e7eb")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture


@dataclass(frozen=True)
class Timed:
    """What a recipe gives, and how long it takes.

    Attributes:
        name: What is written beside it, if anything.
        kind: What it does; one colour for each.
        seconds: CPU seconds to quantize and fine-tune.
        mean: What it gives.
    """

    name: str
    kind: str
    seconds: float
    mean: Mean


def against_time(points: Sequence[Timed], heading: str) -> Figure:
    """Draw the mean of each recipe, with its interval, against the CPU seconds that it took.

    Args:
        points: The recipes.
        heading: What the height is.
    """
    picture = figure(8.2, 4.4)
    axes = axes_of(picture)
    kinds = list(dict.fromkeys(point.kind for point in points))
    shades = dict(zip(kinds, colours(len(kinds)), strict=True))
    for point in points:
        at, colour = (point.seconds, point.mean.value), shades[point.kind]
        axes.errorbar(*at, _interval(point.mean), fmt="o", color=colour, markersize=5, alpha=0.5)
        if point.name:
            axes.annotate(
                point.name, at, (6, 4), textcoords="offset points", fontsize=8, color=INK,
                bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
            )  # fmt: skip
    for kind, colour in shades.items():
        axes.plot([], [], "o", color=colour, label=kind)
    _log_axis(axes)
    heights = [point.mean.value for point in points]
    axes.set_ylim(min(heights) - 3, max(heights) + 4)
    axes.set_xlabel("CPU seconds to quantize and fine-tune")
    axes.set_ylabel(heading)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return picture


def strips(rows: Sequence[tuple[str, Path]]) -> Figure:
    """Draw one labelled strip of images for each recipe; columns start from equal noise."""
    images = [mpl.image.imread(file) for _, file in rows]
    height, width = images[0].shape[:2]
    picture = figure(2.6 + 6.6, (6.6 * height / width + 0.06) * len(rows) + 0.1)
    with mpl.rc_context(STYLE):
        grid = picture.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (label, _), image in zip(grid, rows, images, strict=True):
        axes.imshow(image, interpolation="nearest")
        name_row(axes, label)
    return picture
