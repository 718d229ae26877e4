"""The report of one quantized model: a self-contained HTML page with tables and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from torch import nn

from fpformats import Histogram
from msfp.checkpoint.facts import LayerFacts, execution, overview
from msfp.checkpoint.inspection import inspect_coverage, inspect_layers, inspect_products
from msfp.evaluation.comparison import Comparison
from msfp.layers.base import quantized_networks
from msfp.layers.formats import TENSOR
from msfp.layers.packed import packed_layers
from msfp.layers.scaled import ScaledLayer
from msfp.pipelines.denoiser import by_name
from msfp.reports import figures, html
from msfp.reports.layer_table import COLUMNS, PRODUCT_COLUMNS, cells, product_cells
from msfp.search.layer_search import search_input
from msfp.support.versions import versions

WORST = 4
"""Number of layers whose distributions are drawn."""
SHOWN = 12
"""Images of each model in the side-by-side picture."""


@dataclass(frozen=True)
class ModelReport:
    """The contents of a report.

    Attributes:
        title: Heading of the page.
        model: The pipeline with packed denoisers, or the packed denoiser.
        inputs: Histograms of the full-precision denoiser's layer inputs, by layer; may be empty.
        weights: The full-precision weights of its layers, by layer.
        comparison: The comparison with the full-precision pipeline, or None without one.
    """

    title: str
    model: DiffusionPipeline | nn.Module
    inputs: Mapping[str, Histogram]
    weights: Mapping[str, torch.Tensor]
    comparison: Comparison | None = None

    def html(self) -> str:
        """Return the page."""
        facts = inspect_layers(self.model)
        rows = [cells(each) for each in facts]
        sections = [
            ("", [html.bullets([*findings(facts, self.comparison), *self._coverage()])]),
            *self._compared(),
            ("Error by layer", self._by_layer(facts)),
            ("The worst layers", self._distributions(facts)),
            ("Layer by layer", [
                html.paragraph("A click on a column's name sorts by it.", note=True),
                html.table(COLUMNS, rows, sortable=True),
            ]),
            ("Products of attention", self._products()),
            ("How this was run", [html.table(("", ""), list(versions().items()))]),
        ]  # fmt: skip
        return html.page(self.title, [(name, parts) for name, parts in sections if parts])

    def _coverage(self) -> list[str]:
        """Return the shares of the denoiser by bits, and what stays in full precision."""
        coverage = inspect_coverage(self.model)
        return [] if coverage is None else coverage.sentences()

    def _products(self) -> list[str]:
        """Return the table of the operands of attention's products, where these are quantized."""
        rows = [product_cells(each) for each in inspect_products(self.model)]
        return [html.table(PRODUCT_COLUMNS, rows)] if rows else []

    def _compared(self) -> list[tuple[str, list[str]]]:
        """Return the sections of the comparison."""
        found = self.comparison
        if found is None:
            return []
        pictures = figures.image_rows(
            list(zip(("full precision", "quantized"), _some(found.images), strict=True))
        )
        errors = figures.errors_by_timestep(found.timesteps, [("quantized", found.noise_errors)])
        return [
            ("Images from equal noise", [
                html.image(html.png(pictures), "Every column starts from the same noise."),
                html.table(("measure", "value", "of"), found.table()),
                html.paragraph(
                    f"The Frechet distance is that of {found.count} images of each model. It "
                    "depends on this number, and is meaningful only well above its noise floor, "
                    "which is the distance between two sets of full-precision images.", note=True,
                ),
            ]),
            ("Error by timestep", [
                html.image(
                    html.png(errors),
                    "Mean squared error of the predicted noise where the full-precision model "
                    "passes: what quantization adds at each step, before steps add up.",
                ),
            ]),
        ]  # fmt: skip

    def _by_layer(self, facts: Sequence[LayerFacts]) -> list[str]:
        """Return the picture of the error of each layer, if any error is known."""
        measured = {} if self.comparison is None else self.comparison.layers
        rows = [
            ("weights, as searched", [each.weight_sqnr for each in facts]),
            ("inputs, as searched", [each.input_sqnr for each in facts]),
            ("output, measured", [measured.get(each.layer, math.nan) for each in facts]),
        ]
        rows = [(label, row) for label, row in rows if not all(map(math.isnan, row))]
        if not rows:
            return []
        caption = (
            "Signal to quantization noise of each layer, in the order of the denoiser's modules; "
            "lower is worse. The output is that of the quantized layer for full-precision inputs."
        )
        return [html.image(html.png(figures.errors_by_layer(rows)), caption)]

    def _distributions(self, facts: Sequence[LayerFacts]) -> list[str]:
        """Return pictures of the weights and inputs of the worst layers, with their grids.

        Layers in block formats are left out: they have no single grid.
        """
        layers = by_name(quantized_networks(self.model), packed_layers)
        parts = []
        for each in sorted(facts, key=self._quality)[:WORST]:
            layer = layers[each.layer]
            if not isinstance(layer, ScaledLayer):
                continue
            split = layer.formats is not None and layer.formats.input_granularity != TENSOR
            if each.input is not None and each.layer in self.inputs and not split:
                picture = input_distribution(each, self.inputs[each.layer])
                caption = (
                    f"The inputs of {each.layer} (symmetric logarithmic height), and below them "
                    "the values that the chosen format offers, against the best signed one."
                )
                parts.append(html.image(html.png(picture), caption))
            picture = weight_distribution(each, self.weights[each.layer], layer.weight_scale)
            caption = f"The weights of {each.layer}, each output channel in units of its scale."
            parts.append(html.image(html.png(picture), caption))
        return parts

    def _quality(self, facts: LayerFacts) -> float:
        """Return the SQNR that ranks a layer: measured at its output, else the lower searched."""
        if self.comparison is not None and facts.layer in self.comparison.layers:
            return self.comparison.layers[facts.layer]
        known = [x for x in (facts.weight_sqnr, facts.input_sqnr) if not math.isnan(x)]
        return min(known, default=math.inf)


def findings(facts: Sequence[LayerFacts], comparison: Comparison | None) -> list[str]:
    """Return the main results of the tables as sentences."""
    sentences = [overview(facts), *execution(facts)]
    gains = [each.cost_of_other_sign for each in facts if each.sign == "unsigned"]
    gains = [gain for gain in gains if not math.isnan(gain)]
    if gains:
        sentences.append(
            f"Where inputs are unsigned, the best signed format would have cost "
            f"{statistics.median(gains):.1f} dB at the median, {max(gains):.1f} at most."
        )
    if comparison is not None:
        size, packed = comparison.bytes
        values = comparison.values
        above = values["frechet"] - values["frechet_floor"]
        sentences += [
            f"The denoiser takes {packed / 1e6:.2f} MB, {packed / size:.0%} of the "
            f"{size / 1e6:.2f} MB in full precision.",
            f"Paired images have a PSNR of {values['psnr']:.1f} dB and a structural similarity "
            f"of {values['ssim']:.3f}.",
            f"The Frechet distance is {abs(above):.3g} {'above' if above > 0 else 'below'} its "
            f"noise floor of {values['frechet_floor']:.3g}.",
        ]
    return sentences


def input_distribution(facts: LayerFacts, inputs: Histogram) -> Figure:
    """Draw a layer's inputs with the chosen grid and, if that is unsigned, the best signed grid.

    Args:
        facts: Facts of a layer with quantized inputs.
        inputs: Histogram of its inputs.
    """
    fmt = facts.input
    if fmt is None:
        raise ValueError(f"the inputs of {facts.layer} are not quantized")
    note = "" if math.isnan(facts.input_sqnr) else f" ({facts.input_sqnr:.1f} dB)"
    grids = [(f"{fmt}{note}", fmt, facts.input_scale, facts.zero_point or 0.0)]
    if not fmt.signed:
        _, signed = search_input(inputs, fmt.bits, "signed" if fmt.exponent_bits else "int_mse")
        cost = facts.other_sign_sqnr
        note = "" if math.isnan(cost) else f" ({cost:.1f} dB)"
        grids.insert(0, (f"{signed.format}{note}", signed.format, signed.scale, 0.0))
    return figures.distribution_with_grids(inputs, grids, f"input of {facts.layer}")


def weight_distribution(
    facts: LayerFacts, weight: torch.Tensor, scale_bits: torch.Tensor
) -> Figure:
    """Draw a layer's weights with the chosen grid, each output channel in units of its scale.

    Args:
        facts: Facts of the layer.
        weight: Its full-precision weights, output channels first.
        scale_bits: The bits of its weight scales, as a packed layer stores them.
    """
    scale = scale_bits.view(torch.float32).view(-1, *(1,) * (weight.dim() - 1))
    normalised = Histogram()
    normalised.update((weight.float() / scale).flatten())
    note = "" if math.isnan(facts.weight_sqnr) else f" ({facts.weight_sqnr:.1f} dB)"
    grids = [(f"{facts.weight}{note}", facts.weight, 1.0, 0.0)]
    heading = f"weights of {facts.layer} over the scale of their channel"
    return figures.distribution_with_grids(normalised, grids, heading)


def _some(images: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    return [each[:SHOWN].float() for each in images]
