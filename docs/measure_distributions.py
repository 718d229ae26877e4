"""Measure inputs of layers, and histograms of them: `python docs/measure_distributions.py`.

Prints the table of docs/method.md, on negatives beside positives before and after activation
functions, and that of docs/search.md, on how far off a search of a histogram is.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.nn.functional import gelu, silu

import msfp
from fpformats import Choice, FloatFormat, Histogram, parse, search
from fpformats.fitting.search import ZERO_POINTS
from msfp import reference_pipeline
from msfp.search.schemes import float_formats
from msfp.support.decibels import sqnr

COUNT = 1_000_000
FORMATS = {
    4: ("E0M3", "E1M2", "E2M1", "E3M0", "E1M3U", "E2M2U", "E3M1U", "E4M0U"),
    8: ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E2M6U", "E4M4U"),
}
SAMPLES = 64
CALLS = msfp.Sampler(steps=20, batch=16)


def normal(deviation: float = 1.0) -> torch.Tensor:
    """Return normal numbers, float32."""
    return deviation * torch.randn(COUNT, generator=torch.Generator().manual_seed(0))


def histogram_of(x: torch.Tensor) -> Histogram:
    """Return the histogram of a tensor."""
    histogram = Histogram()
    histogram.update(x)
    return histogram


def energy(inputs: Histogram) -> float:
    """Return the sum of squares of the negatives by that of the positives."""
    _, sums, squares = inputs.bins()
    return float(squares[sums < 0].sum() / squares[sums > 0].sum())


def gain(x: torch.Tensor) -> float:
    """Return by how many decibels the best unsigned 4-bit format is better than the best signed."""
    signal = x.double().square().sum().item()
    signed = search(x, float_formats(4, signed=True))
    unsigned = search(x, float_formats(4, signed=False), zero_points=ZERO_POINTS)
    return sqnr(signal, unsigned.squared_error) - sqnr(signal, signed.squared_error)


def negatives() -> Table:
    """Return the table of negatives beside positives."""
    table = Table("inputs", "energy of negatives by that of positives", "gain of unsigned, dB")
    table.add_row("normal, standard deviation 1", f"{energy(histogram_of(normal())):.2f}", "")
    for name, x in (
        ("the same after SiLU", silu(normal())),
        ("the same after GELU", gelu(normal())),
        ("standard deviation 3, after SiLU", silu(normal(3.0))),
    ):
        table.add_row(name, f"{energy(histogram_of(x)):.3f}", f"{gain(x):.1f}")
    seen = msfp.calibrate(reference_pipeline(), calls=CALLS.calls(SAMPLES, seed=0))
    squeezed = [energy(seen.inputs[name]) for name in seen.ran if name in seen.activations]
    others = [energy(seen.inputs[name]) for name in seen.ran if name not in seen.activations]
    for name, found in (("after SiLU", squeezed), ("all others", others)):
        table.add_row(f"layers of digits, {name}", f"{min(found):.2f} to {max(found):.2f}", "")
    return table


def true_error(x: NDArray[np.float32], choice: Choice) -> float:
    """Return the sum of squared errors of quantizing with what a search found."""
    return float(np.square(x.astype(np.float64) - choice.quantize(x)).sum())


def excesses(x: torch.Tensor, formats: Sequence[FloatFormat]) -> Iterator[tuple[float, float]]:
    """Yield for each format what a histogram adds: to the error reported, and to the true error."""
    array, zero_points = x.numpy(), ZERO_POINTS if x.min() < 0 else None
    exact = search(array, formats, zero_points=zero_points).by_format
    of_bins = search(histogram_of(x), formats, zero_points=zero_points).by_format
    for fmt, choice in of_bins.items():
        error = true_error(array, choice)
        yield choice.squared_error / error - 1, error / true_error(array, exact[fmt]) - 1


def histograms() -> Table:
    """Return the table of how far off a search of a histogram is, at most."""
    functions: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        torch.nn.Identity(),
        silu,
        torch.relu,
    )
    table = Table("bits", "error reported above the true one", "error above that of exact search")
    for bits, names in FORMATS.items():
        formats = [parse(name) for name in names]
        found = [each for f in functions for each in excesses(f(normal()), formats)]
        reported, true = (max(each) for each in zip(*found, strict=True))
        table.add_row(str(bits), f"{reported:.1e}", f"{true:.1e}")
    return table


def main() -> None:
    """Measure and print."""
    Console().print(negatives(), histograms())


if __name__ == "__main__":
    main()
