"""The demo's results as a terminal table, a JSON file, pictures and one HTML page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fpformats import parse
from msfp import plots, report
from msfp.checkpoint import save
from msfp.demo.results import FULL_PRECISION, Results, Row, findings, versions
from msfp.post_training import search_input
from msfp.summary import LayerSummary

HEADER = (
    "method", "noise\nerror", "paired\nPSNR dB", "Frechet\ndistance",
    "in seed\nnoise", "unsigned\nlayers", "size\nKB", "time\ncore s",
)  # fmt: skip
SHOWN = 12
"""Images of each method in the side-by-side picture."""


def title(results: Results) -> str:
    """Return the heading of a run."""
    bits = results.config
    ends = f"first and last layer at {bits.first_last} bits"
    return f"W{bits.weights}A{bits.activations} diffusion model of digits ({ends})"


def cells(row: Row, results: Results) -> tuple[str, ...]:
    """Return a row of the table as text."""
    full = row.method == FULL_PRECISION
    return (
        row.method,
        "0" if full else f"{row.noise_error:.4f}",
        "same" if row.psnr is None else f"{row.psnr:.1f}",
        f"{row.frechet:.2f}",
        "yes" if row.frechet <= max(results.seed_noise) else "no",
        "" if full else f"{row.unsigned_layers}/{len(results.layers)}",
        f"{row.bytes / 1000:.0f}",
        "" if full else f"{row.seconds:.0f}",
    )


def terminal_table(results: Results) -> Table:
    """Return the table that ends a run."""
    table = Table(title=title(results), title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in results.rows:
        table.add_row(*cells(row, results))
    return table


def most_gained(results: Results) -> LayerSummary:
    """Return the inner layer whose input gained most from an unsigned format."""
    return max(
        (layer for layer in results.layers if layer.unsigned),
        key=lambda layer: layer.input_sqnr - layer.signed_input_sqnr,
        default=results.layers[0],
    )


def distribution(results: Results, layer: LayerSummary) -> Figure:
    """Draw a layer's inputs with the chosen grid and the best signed one below them."""
    inputs = results.inputs[layer.name]
    bits = parse(layer.input_format).bits
    _, signed = search_input(inputs, bits, "signed")
    grids = [
        (f"{signed.format} ({layer.signed_input_sqnr:.1f} dB)", signed.format, signed.scale, 0.0)
    ]
    if layer.unsigned:
        label = f"{layer.input_format} ({layer.input_sqnr:.1f} dB)"
        zero = layer.input_zero_point or 0.0
        grids.append((label, parse(layer.input_format), layer.input_scale, zero))
    return plots.distribution_with_grids(inputs, grids, f"input of {layer.name}")


def figures(results: Results) -> dict[str, tuple[Figure, str]]:
    """Return every picture of the report with its caption."""
    methods = results.rows[1:]
    names = [row.method for row in methods]
    pairs = [(row.method, results.images[row.method][:SHOWN]) for row in results.rows]
    layer = most_gained(results)
    errors = [(row.method, row.errors) for row in methods]
    return {
        "images": (
            plots.image_rows(pairs),
            "Every column starts from the same noise. The first row is the full-precision model.",
        ),
        "errors": (
            plots.error_points(
                names, [row.noise_error for row in methods], "noise-prediction error"
            ),
            "Mean squared error of the predicted noise on held-out full-precision trajectories.",
        ),
        "errors_by_timestep": (
            plots.errors_by_timestep(results.timesteps, errors),
            "The same error at each timestep of the sampler.",
        ),
        "distribution": (
            distribution(results, layer),
            f"The inputs of {layer.name} over all timesteps (symmetric logarithmic height), and "
            "below them the values that each format offers. The unsigned grid spends no values "
            "on the empty left side.",
        ),
        "routing": (
            plots.routing_picture(results.timesteps, np.array(results.routing)),
            "The LoRA that the router of the last method gives each layer at each timestep.",
        ),
    }


LAYER_HEADER = (
    "layer", "weights", "weights dB", "inputs", "zero point", "inputs dB", "best signed dB",
)  # fmt: skip


def layer_cells(layer: LayerSummary) -> tuple[str, ...]:
    """Return a layer's row of the per-layer table."""
    zero = "" if layer.input_zero_point is None else f"{layer.input_zero_point:.2f}"
    return (
        layer.name,
        layer.weight_format,
        f"{layer.weight_sqnr:.1f}",
        layer.input_format or "",
        zero,
        f"{layer.input_sqnr:.1f}",
        f"{layer.signed_input_sqnr:.1f}",
    )


def html_page(results: Results, pictures: dict[str, tuple[bytes, str]]) -> str:
    """Return the report as one self-contained page."""

    def picture(name: str) -> str:
        data, caption = pictures[name]
        return report.image(data, caption)

    header = [name.replace("\n", " ") for name in HEADER]
    rows = [cells(row, results) for row in results.rows]
    run = {"seed": str(results.seed), **versions()}
    return report.page(
        title(results),
        [
            ("", [
                report.paragraph(
                    "A small denoising diffusion model of handwritten digits is quantized, weights "
                    "and activations, convolutions included, by each of the methods below, and "
                    "then fine-tuned without data along its own sampling trajectories."
                ),
                picture("images"),
                report.table(header, rows),
                report.paragraph(
                    "Order methods by the noise-prediction error first and the paired PSNR second. "
                    "The Frechet distance only tells whether a model is within the noise that "
                    "another seed makes in full precision. DFA minimises an error that is weighted "
                    "by timestep; the one in the table is not. INT is symmetric, but for the row "
                    "with a zero point.", note=True,
                ),
            ]),
            ("What this run shows", [report.bullets(findings(results))]),
            ("Errors", [picture("errors"), picture("errors_by_timestep")]),
            ("Why the sign bit matters", [picture("distribution")]),
            ("Which LoRA at which timestep", [picture("routing")]),
            ("Layer by layer", [
                report.table(LAYER_HEADER, [layer_cells(layer) for layer in results.layers]),
            ]),
            ("How this was run", [report.table(("", ""), list(run.items()))]),
        ],
    )  # fmt: skip


def write(results: Results, folder: Path) -> None:
    """Write report.html, results.json, the pictures, the image grids and the last checkpoint."""
    images = folder / "images"
    images.mkdir()
    pictures = {}
    for name, (picture, caption) in figures(results).items():
        pictures[name] = report.png(picture), caption
        (images / f"{name}.png").write_bytes(pictures[name][0])
    for method, samples in results.images.items():
        name = re.sub(r"\W+", "_", method.lower())
        plots.save_image_grid(samples, images / f"samples_{name}.png")
    (folder / "report.html").write_text(html_page(results, pictures))
    (folder / "results.json").write_text(json.dumps(results.to_dict(), indent=1) + "\n")
    save(results.pipe, folder / "checkpoint")
