"""The demo's results as a terminal table, a JSON file, pictures and one HTML page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from msfp.checkpoint.facts import LayerFacts
from msfp.checkpoint.inspection import inspect_layers
from msfp.checkpoint.io import save
from msfp.experiments.demo.results import FULL_PRECISION, Results, Row, findings
from msfp.reports import figures, html
from msfp.reports.layer_table import COLUMNS
from msfp.reports.layer_table import cells as layer_cells
from msfp.reports.model_page import input_distribution
from msfp.support.versions import versions

HEADER = (
    "method", "noise\nerror", "paired\nPSNR dB", "Frechet\ndistance",
    "in seed\nnoise", "unsigned\nlayers", "size\nKB", "time\ncore s",
)  # fmt: skip
SHOWN = 12
"""Number of images of each method in the side-by-side picture."""


def title(results: Results) -> str:
    """Return the heading of a run."""
    config = results.config
    ends = f"first and last layer at {config.end_bits} bits"
    return f"W{config.weight_bits}A{config.activation_bits} diffusion model of digits ({ends})"


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
    """Return the table that a run prints at its end."""
    table = Table(title=title(results), title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in results.rows:
        table.add_row(*cells(row, results))
    return table


def most_gained(facts: list[LayerFacts]) -> LayerFacts:
    """Return the layer whose input gains most from an unsigned format."""
    return max(
        (each for each in facts if each.sign == "unsigned"),
        key=lambda each: each.cost_of_other_sign,
        default=facts[0],
    )


def drawings(results: Results) -> dict[str, tuple[Figure, str]]:
    """Return every picture of the report with its caption."""
    methods = results.rows[1:]
    names = [row.method for row in methods]
    pairs = [(row.method, results.images[row.method][:SHOWN]) for row in results.rows]
    layer = most_gained(inspect_layers(results.pipe))
    errors = [(row.method, row.errors) for row in methods]
    return {
        "images": (
            figures.image_rows(pairs),
            "Every column starts from the same noise. The first row is the full-precision model.",
        ),
        "errors": (
            figures.error_points(
                names, [row.noise_error for row in methods], "noise-prediction error"
            ),
            "Mean squared error of the predicted noise on held-out full-precision trajectories.",
        ),
        "errors_by_timestep": (
            figures.errors_by_timestep(results.timesteps, errors),
            "The same error at each timestep of the sampler.",
        ),
        "distribution": (
            input_distribution(layer, results.inputs[layer.layer]),
            f"The inputs of {layer.layer} over all timesteps (symmetric logarithmic height), and "
            "below them the values that each format offers. The unsigned grid spends no values "
            "on the empty left side.",
        ),
        "routing": (
            figures.routing_picture(results.timesteps, np.array(results.routing)),
            "The LoRA that the router of the last method gives each layer at each timestep.",
        ),
    }


def html_page(results: Results, pictures: dict[str, tuple[bytes, str]]) -> str:
    """Return the report as one self-contained page."""

    def picture(name: str) -> str:
        data, caption = pictures[name]
        return html.image(data, caption)

    header = [name.replace("\n", " ") for name in HEADER]
    rows = [cells(row, results) for row in results.rows]
    layers = [layer_cells(each) for each in inspect_layers(results.pipe)]
    run = {"seed": str(results.seed), **versions()}
    return html.page(
        title(results),
        [
            ("", [
                html.paragraph(
                    "A small denoising diffusion model of handwritten digits is quantized, weights "
                    "and activations, convolutions included, by each of the methods below, and "
                    "then fine-tuned without data along its own sampling trajectories."
                ),
                picture("images"),
                html.table(header, rows),
                html.paragraph(
                    "Order methods by the noise-prediction error first and the paired PSNR second. "
                    "The Frechet distance only tells whether a model is within the noise that "
                    "another seed makes in full precision. DFA minimises an error that is weighted "
                    "by timestep; the one in the table is not. INT is symmetric, but for the row "
                    "with a zero point.", note=True,
                ),
            ]),
            ("What this run shows", [html.bullets(findings(results))]),
            ("Errors", [picture("errors"), picture("errors_by_timestep")]),
            ("Why the sign bit matters", [picture("distribution")]),
            ("Which LoRA at which timestep", [picture("routing")]),
            ("Layer by layer", [
                html.table(COLUMNS, layers, sortable=True),
            ]),
            ("How this was run", [html.table(("", ""), list(run.items()))]),
        ],
    )  # fmt: skip


def write(results: Results, folder: Path) -> None:
    """Write report.html, results.json, the pictures, the image grids and the last checkpoint."""
    images = folder / "images"
    images.mkdir()
    pictures = {}
    for name, (picture, caption) in drawings(results).items():
        pictures[name] = html.png(picture), caption
        (images / f"{name}.png").write_bytes(pictures[name][0])
    for method, samples in results.images.items():
        name = re.sub(r"\W+", "_", method.lower())
        figures.save_image_grid(samples, images / f"samples_{name}.png")
    (folder / "report.html").write_text(html_page(results, pictures))
    (folder / "results.json").write_text(json.dumps(results.to_dict(), indent=1) + "\n")
    save(results.pipe, folder / "checkpoint")
