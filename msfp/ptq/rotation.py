"""Rotation of inputs before they are rounded.

A few channels of an input can be much larger than the others, and one scale must suit all. An
orthogonal transform of groups of channels spreads them (QuaRot, Ashkboos et al., NeurIPS 2024).
Here it is the Hadamard transform, which the layer computes when it runs; the weight is transformed
once. A rotated input has both signs, so that its format is signed: what an unsigned format with a
zero point gains is lost. Each layer therefore gets the size of groups, or no rotation, with which
the rounding of its inputs changes its output least.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats import Histogram, hadamard
from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.config import MAX_BITS
from msfp.layers.base import WEIGHT_AXIS
from msfp.layers.execution.grids import token_sizes
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.formats import ROTATIONS, can_rotate
from msfp.layers.trainable import TrainableLayer, untrained_layers
from msfp.layers.trainable_block import TrainableBlockLayer
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.ptq.input_visits import Look, look_at_inputs
from msfp.ptq.low_rank_branches import searched_again
from msfp.search.layer_search import quantizer_of_input, search_formats
from msfp.search.observers import draw
from msfp.search.schemes import float_formats, integer_formats
from msfp.support.checks import check_seed, check_truth, check_type, check_whole

SAMPLES = 32
"""Most samples on which rotations are compared."""
WORTH = 0.9
"""Error of a rotated layer's output, relative to that without rotation, that is worth its time."""


class Way(NamedTuple):
    """A way to round the input of a layer.

    Attributes:
        size: Size of the groups of channels that are rotated, 1 for none.
        by_token: Whether each token has a scale.
    """

    size: int
    by_token: bool


PLAIN = Way(1, by_token=False)
"""The way that a layer has before the search, whatever its scales."""


def rotate_inputs(
    model: DiffusionPipeline | nn.Module,
    *,
    trajectories: Trajectories,
    samples: int = SAMPLES,
    batch: int | None = None,
    token_scales: bool = False,
    seed: int = 0,
) -> list[str]:
    """Rotate the inputs of layers before rounding, in place, where their outputs have less error.

    Only layers whose input has less than 8 bits, and whose channels are in one group that a size
    divides, are candidates.

    Args:
        model: A pipeline or its denoiser, quantized by `quantize` and trainable.
        trajectories: Recorded from the full-precision denoiser.
        samples: Largest number of noisy samples to use, spread evenly over the timesteps.
        batch: Largest number of samples in one forward, as for `RefinementConfig`.
        token_scales: Whether the rotated inputs of linear layers may have a scale for each token.
        seed: Seed of the draws.

    Returns:
        The names of the layers whose input is rotated.

    Raises:
        InputError: If the denoiser has no quantized layer, or has one that is packed, has LoRAs or
            is rotated already, or an argument has the wrong type.
    """
    denoiser = denoiser_of(model)
    check_type("trajectories", trajectories, Trajectories)
    check_whole("samples", samples, 1, 10**6)
    if batch is not None:
        check_whole("batch", batch, 1, 10**6)
    check_truth("token_scales", token_scales)
    check_seed(seed)
    layers = {n: each for n, each in untrained_layers(denoiser).items() if _is_eligible(each)}
    if not layers:
        return []
    steps, rows = trajectories.samples.shape[:2]
    sample = spread_batch(steps, rows, samples, torch.Generator().manual_seed(seed))

    def look(note: Look) -> None:
        look_at_inputs(denoiser, layers, trajectories, sample, batch, note)

    searches = {name: _Search(layer, token_scales) for name, layer in layers.items()}
    look(lambda name, x: searches[name].see(x))
    for each in searches.values():
        each.fit()
    look(lambda name, x: searches[name].compare(x))
    rotated = [name for name, each in searches.items() if each.best.size > 1]
    for name in rotated:
        searches[name].apply()
    attach_again(denoiser)
    return rotated


def _is_eligible(layer: TrainableLayer) -> bool:
    """Return whether the input of a layer has less than 8 bits, and channels for a rotation."""
    if isinstance(layer, TrainableBlockLayer):
        blocks = layer.formats.input_blocks
        fmt = None if blocks is None else blocks.element
    else:
        fmt = None if layer.input_quantizer is None else layer.input_quantizer.format
    narrow = fmt is not None and fmt.bits < MAX_BITS
    return narrow and layer.rotation == 1 and can_rotate(layer, ROTATIONS[0])


class _Search:
    """The search of the best way to round the input of one layer.

    Args:
        layer: The layer.
        token_scales: Whether tokens may have scales of their own.
    """

    def __init__(self, layer: TrainableLayer, token_scales: bool) -> None:
        self.layer = layer
        self.blocks = isinstance(layer, TrainableBlockLayer)
        by_token = token_scales and not self.blocks and not layer.kind.places
        sizes = [size for size in ROTATIONS if can_rotate(layer, size)]
        self.ways = [Way(size, each) for size in sizes for each in {False, by_token}]
        self.histograms = {way: Histogram() for way in self.ways}
        self.quantizers: dict[Way, Quantizer] = {}
        self.errors: dict[Way, float] = {}
        self.runs = 0

    def see(self, x: torch.Tensor) -> None:
        """Add an input to the histograms of what is rounded."""
        if self.blocks:
            return
        self.runs += 1
        for way in self.ways:
            turned = self._turned(x, way.size)
            turned = turned / token_sizes(turned) if way.by_token else turned
            self.histograms[way].update(draw(turned, f"{way} {self.runs}"))

    def fit(self) -> None:
        """Search the formats and scales of all ways."""
        old = self.layer.input_quantizer
        if old is None:
            return
        formats = float_formats if old.format.exponent_bits else integer_formats
        for way, histogram in self.histograms.items():
            if self.runs and not histogram.nonfinite:
                allowed = formats(old.format.bits, signed=True)
                grid = quantizer_of_input(search_formats(histogram, allowed))
                new = Quantizer(grid.format, grid.scale, by_token=way.by_token)
                self.quantizers[way] = new.to(old.scale.device)

    def compare(self, x: torch.Tensor) -> None:
        """Add what the rounding of an input changes in the output."""
        layer = self.layer
        weight = layer.weight.detach().float()
        self._add(PLAIN, layer.quantize_input(x) - x, weight)
        for way in self.ways if self.blocks else self.quantizers:
            turned = self._turned(x, way.size)
            quantize = layer.quantize_input if self.blocks else self.quantizers[way]
            self._add(way, self._turned(quantize(turned) - turned, way.size), weight)

    def _add(self, way: Way, error: torch.Tensor, weight: torch.Tensor) -> None:
        change = self.layer.compute(error, weight, None).square().sum()
        self.errors[way] = self.errors.get(way, 0.0) + float(change)

    @property
    def best(self) -> Way:
        """The way with the least error; none if that gains little or the layer did not run."""
        best = min(self.errors, key=lambda way: self.errors[way], default=PLAIN)
        gains = best != PLAIN and self.errors[best] < WORTH * self.errors[PLAIN]
        return best if gains else PLAIN

    def apply(self) -> None:
        """Rotate the input of the layer in the best way."""
        layer, way = self.layer, self.best
        weight = hadamard(layer.weight.detach().float(), way.size, axis=WEIGHT_AXIS)
        layer.weight_quantizer = searched_again(weight, layer.weight_quantizer)
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
        if not self.blocks:
            layer.input_quantizer = self.quantizers[way]
        layer.rotation = way.size

    def _turned(self, x: torch.Tensor, size: int) -> torch.Tensor:
        turned: torch.Tensor = hadamard(x, size, axis=self.layer.kind.channel_axis(x))
        return turned
