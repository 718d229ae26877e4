"""Plots of a study, one for each question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from msfp.plots import GREY, INK, STYLE, UNSIGNED, axes_of, figure, name_row
from msfp.study.statistics import Mean

MANY = 6
"""Settings of which the names do not fit side by side."""


def ladder_points(rows: Sequence[tuple[str, Mean, Sequence[float]]], heading: str) -> Figure:
    """Draw the mean of each recipe with its interval, and every replicate, on a log axis."""
    picture = figure(7.2, 0.36 * len(rows) + 0.9)
    axes = axes_of(picture)
    for height, (_, mean, values) in enumerate(rows):
        axes.plot(values, [height] * len(values), "o", color=GREY, markersize=4)
        axes.errorbar(mean.value, height, xerr=_margin(mean), fmt="o", color=UNSIGNED, capsize=3)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.invert_yaxis()
    _log_axis(axes)
    axes.set_xlabel(heading)
    return picture


def _margin(mean: Mean) -> float | None:
    """Return the half width of an interval that a log axis can show."""
    return None if np.isnan(mean.margin) else min(mean.margin, 0.9 * mean.value)


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="both", color="#e4e7eb")
    axes.set_axisbelow(True)


def lines(
    series: Mapping[str, Mapping[str, Mean]], names: Sequence[str], heading: str, xlabel: str
) -> Figure:
    """Draw the mean of each recipe at each setting, with intervals.

    Args:
        series: Means by recipe and setting.
        names: The settings from left to right; those that differ after the last "-" alone, such as
            a sampler's steps, are joined by a line.
        heading: What the height is.
        xlabel: What the settings are.
    """
    picture = figure(7.2, 3.8)
    axes = axes_of(picture)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(series)))
    for index, ((label, means), colour) in enumerate(zip(series.items(), colours, strict=True)):
        families = groupby(names, lambda name: name.rpartition("-")[0])
        for position, (_, members) in enumerate(families):
            known = [name for name in members if name in means]
            axes.errorbar(
                [names.index(name) + 0.06 * (index - len(series) / 2) for name in known],
                [means[name].value for name in known],
                yerr=[np.nan_to_num(means[name].margin) for name in known],
                fmt="o-",
                markersize=5,
                linewidth=1,
                capsize=3,
                label=None if position else label,
                color=colour,
            )
    # The means rule the height: an interval of two or three seeds may be as wide as it likes.
    heights = [mean.value for means in series.values() for mean in means.values()]
    margin = 0.3 * (max(heights) - min(heights)) + 0.5
    axes.set_ylim(min(heights) - margin, max(heights) + margin)
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", rotation=40 if len(names) > MANY else 0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(heading)
    axes.grid(axis="y", color="#e4e7eb")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture


def against_time(points: Sequence[tuple[str, float, Mean]], heading: str) -> Figure:
    """Draw the mean of each recipe against the CPU seconds that it took.

    Those have their name beside them that nothing faster is better than.

    Args:
        points: Label, CPU seconds to quantize and fine-tune, and mean of each recipe.
        heading: What the height is.
    """
    picture = figure(7.2, 3.8)
    axes = axes_of(picture)
    best = -np.inf
    for label, seconds, mean in sorted(points, key=lambda point: point[1]):
        ahead, best = mean.value > best, max(best, mean.value)
        axes.plot(seconds, mean.value, "o", color=UNSIGNED if ahead else GREY)
        if ahead:
            at = (seconds, mean.value)
            axes.annotate(label, at, (6, 3), textcoords="offset points", fontsize=8, color=INK)
    _log_axis(axes)
    axes.set_xlabel("CPU seconds to quantize and fine-tune")
    axes.set_ylabel(heading)
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
