"""Pictures of a quantized model: images, errors, distributions with format grids, routing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from fpformats import FloatFormat, Histogram, values

INK, SIGNED, UNSIGNED, GREY = "#1f2933", "#c2410c", "#0f766e", "#9aa5b1"
DISTINCT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2933", "#9aa5b1")
"""Colours that colour-blind readers can tell apart (Okabe and Ito, 2008), and two greys."""
SMALL = 48
"""Height in pixels up to which smaller images are enlarged."""
STYLE: Any = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def figure(width: float, height: float) -> Figure:
    """Return an empty figure in the house style; no display is needed."""
    with mpl.rc_context(STYLE):
        return Figure(figsize=(width, height), dpi=130, layout="constrained")


def axes_of(picture: Figure) -> Axes:
    """Return the single axes of a figure in the house style."""
    with mpl.rc_context(STYLE):
        return picture.add_subplot()


def colours(count: int) -> list[Any]:
    """Return `count` colours: distinct ones, or a continuous scale if there are not enough."""
    if count <= len(DISTINCT):
        return list(DISTINCT[:count])
    return list(mpl.colormaps["viridis"](np.linspace(0, 0.92, count)))


def tiled(images: torch.Tensor, columns: int) -> NDArray[np.float32]:
    """Return images (n, 1 or 3, h, w) in [0, 1] tiled row by row, one pixel apart."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), np.float32)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_image_grid(images: torch.Tensor, file: Path, columns: int = 8) -> None:
    """Write images as one PNG; small images are enlarged."""
    zoom = max(1, SMALL // images.shape[2])
    canvas = tiled(images, columns).repeat(zoom, axis=0).repeat(zoom, axis=1)
    mpl.image.imsave(file, canvas.repeat(3, axis=2) if canvas.shape[2] == 1 else canvas)


def image_rows(rows: Sequence[tuple[str, torch.Tensor]]) -> Figure:
    """Draw one labelled row of images for each method; the images of a column share their noise."""
    columns, side = len(rows[0][1]), 0.52 if rows[0][1].shape[2] <= SMALL else 1.2
    picture = figure(2.6 + side * columns, (side + 0.06) * len(rows) + 0.1)
    with mpl.rc_context(STYLE):
        grid = picture.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (label, images) in zip(grid, rows, strict=True):
        canvas = tiled(images, columns)
        axes.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        name_row(axes, label)
    return picture


def name_row(axes: Axes, label: str) -> None:
    """Write a label to the left of a row of images, and remove ticks and spines."""
    axes.set_ylabel(label, rotation=0, ha="right", va="center")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def error_points(labels: Sequence[str], errors: Sequence[float], heading: str) -> Figure:
    """Draw one point for each method on a logarithmic axis, with its value beside it."""
    picture = figure(7.2, 0.36 * len(labels) + 0.9)
    axes = axes_of(picture)
    axes.plot(errors, range(len(labels)), "o", color=UNSIGNED, markersize=8)
    for row, error in enumerate(errors):
        axes.annotate(f"{error:.4f}", (error, row), (9, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(errors) / 1.5, max(errors) * 1.8)
    _plain_decades(axes.xaxis)
    axes.grid(axis="both", color="#e4e7eb")
    axes.set_axisbelow(True)
    axes.set_xlabel(heading)
    return picture


def _plain_decades(axis: Axis) -> None:
    """Put plain-number ticks on a logarithmic axis at 1, 2 and 5 times each power of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def errors_by_timestep(
    timesteps: Sequence[float],
    rows: Sequence[tuple[str, Sequence[float]]],
    shades: Sequence[str] | None = None,
) -> Figure:
    """Draw the noise-prediction error of each method against the timestep, in `shades` if given."""
    picture = figure(7.2, 3.8)
    axes = axes_of(picture)
    for (label, errors), colour in zip(rows, shades or colours(len(rows)), strict=True):
        axes.plot(timesteps, errors, marker="o", markersize=3, label=label, color=colour)
    axes.set_yscale("log")
    _plain_decades(axes.yaxis)
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_xlabel("timestep t (noise on the left, picture on the right)")
    axes.set_ylabel("error of the prediction")
    axes.invert_xaxis()
    if len(rows) > 1:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture


def errors_by_layer(rows: Sequence[tuple[str, Sequence[float]]]) -> Figure:
    """Draw up to three signal-to-noise ratios of each layer in dB, one colour for each kind."""
    picture = figure(9.2, 3.8)
    axes = axes_of(picture)
    for (label, ratios), colour in zip(rows, (GREY, UNSIGNED, SIGNED), strict=False):
        axes.plot(range(len(ratios)), ratios, "o", markersize=4, label=label, color=colour)
    axes.set_xlabel("layer, in the order of the denoiser's modules")
    axes.set_ylabel("signal to noise, dB")
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture


def distribution_with_grids(
    inputs: Histogram,
    grids: Sequence[tuple[str, FloatFormat, float, float]],
    heading: str,
) -> Figure:
    """Draw a histogram of a layer's input, and below it the values that each format represents.

    Args:
        inputs: Histogram of the layer's input from calibration.
        grids: Label, format, scale and zero point of each grid. The last one is the chosen grid;
            the axis shows its whole range.
        heading: Label of the horizontal axis.
    """
    picture = figure(7.2, 2.4 + 0.35 * len(grids))
    axes = axes_of(picture)
    _, fmt, scale, zero_point = grids[-1]
    low = min(inputs.quantile(0.002), scale * float(fmt.min) + zero_point)
    high = max(inputs.quantile(0.998), scale * float(fmt.max) + zero_point)
    margin = 0.05 * (high - low)
    counts, sums, _ = inputs.bins()
    heights, _, _ = axes.hist(
        sums / counts,
        weights=counts,
        bins=160,
        range=(low - margin, high + margin),
        density=True,
        color=GREY,
    )
    top = float(np.max(heights))
    axes.set_yscale("symlog", linthresh=top / 50)
    for row, (label, fmt, scale, zero_point) in enumerate(grids):
        colour = SIGNED if fmt.signed else UNSIGNED
        points = scale * values(fmt) + zero_point
        inside = points[(points >= low - margin) & (points <= high + margin)]
        height = -(row + 1) * top / 90
        axes.plot(inside, np.full(len(inside), height), "|", color=colour, ms=13, mew=1.6)
        note = f"{label}: {len(inside)} of {len(points)} values in view"
        axes.annotate(
            note,
            (1.0, height),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="center",
            fontsize=8,
            color=colour,
        )
    axes.yaxis.set_visible(False)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel(heading)
    axes.spines["left"].set_visible(False)
    return picture


def routing_picture(timesteps: Sequence[float], choices: NDArray[np.int64]) -> Figure:
    """Draw which LoRA the router selects for each layer (rows) at each timestep (columns)."""
    picture = figure(7.2, 4.6)
    axes = axes_of(picture)
    adapters = int(choices.max()) + 1
    shades = mpl.colormaps["viridis"].resampled(max(adapters, 2))
    image = axes.imshow(
        choices,
        aspect="auto",
        cmap=shades,
        vmin=-0.5,
        vmax=max(adapters, 2) - 0.5,
        interpolation="nearest",
    )
    axes.set_xticks(range(0, len(timesteps), 2), [f"{t:g}" for t in timesteps[::2]])
    axes.set_xlabel("timestep t")
    axes.set_ylabel("layer, in the order of definition")
    picture.colorbar(image, ax=axes, ticks=range(adapters), label="LoRA chosen")
    return picture


def training_picture(losses: Sequence[float], errors: dict[int, float]) -> Figure:
    """Draw the training loss of each step, and the held-out error where it was measured."""
    picture = figure(7.2, 3.4)
    axes = axes_of(picture)
    axes.plot(range(1, len(losses) + 1), losses, color=GREY, linewidth=0.8, label="loss of a batch")
    if errors:
        steps, heights = zip(*errors.items(), strict=True)
        axes.plot(steps, heights, "o-", color=UNSIGNED, markersize=4, label="held-out error")
    axes.set_yscale("log")
    _plain_decades(axes.yaxis)
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_xlabel("steps")
    axes.set_ylabel("weighted squared error")
    axes.legend(fontsize=8, frameon=False)
    return picture
