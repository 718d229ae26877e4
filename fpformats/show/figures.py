"""Pictures of formats, as PNG files; drawing needs matplotlib, which is imported only here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fpformats.ops.elementwise import quantize, values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fpformats.formats import FloatFormat


def plot_grid(formats: Sequence[FloatFormat], path: str | Path) -> Path:
    """Draw the finite values of formats as marks on lines, relative to each format's largest.

    Args:
        formats: One or more formats of at most 10 bits.
        path: The PNG file to write.

    Returns:
        The path.

    Raises:
        ValueError: If there is no format, or one has too many codes to draw.
    """
    if not formats or any(fmt.bits > 10 for fmt in formats):
        raise ValueError("formats must hold at least one format, each of at most 10 bits")
    figure, axes = _figure(0.5 + 0.45 * len(formats))
    for row, fmt in enumerate(formats):
        listed = values(fmt) / fmt.max
        axes.plot(listed, np.full(listed.shape, -row), "|", markersize=14, color="C0")
    axes.set_yticks([-row for row in range(len(formats))], [str(fmt) for fmt in formats])
    axes.set_xlabel("value / max")
    return _save(figure, path)


def plot_rounding(
    fmt: FloatFormat, path: str | Path, roundings: Sequence[str] = ("NearestTiesToEven",)
) -> Path:
    """Plot rounded numbers against numbers, over the range of a format and a little beyond.

    Args:
        fmt: A format that float64 holds.
        path: The PNG file to write.
        roundings: Names of rounding modes that use no random words.

    Returns:
        The path.
    """
    low = fmt.min if fmt.signed else -0.25 * fmt.max
    x = np.linspace(1.1 * low, 1.1 * fmt.max, 4001)
    figure, axes = _figure(4.0)
    axes.plot(x, x, color="0.8", linewidth=1)
    for mode in roundings:
        axes.plot(x, quantize(x, fmt, rounding=mode), linewidth=1.2, label=str(mode))
    axes.set_xlabel("x")
    axes.set_ylabel(f"{fmt}(x)")
    axes.legend(frameon=False)
    return _save(figure, path)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | Path) -> Path:
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return Path(path)
