"""Separate scales for the tokens of linear layers.

Tokens of one input have different ranges, and so have the inputs of different timesteps. A scale
for each token, its largest magnitude times one number, is computed when the layer runs (ZeroQuant,
Yao et al., NeurIPS 2022). The format, this number and the zero point are searched on tokens that
are divided by their largest magnitude. A layer gets such scales where the inputs have less error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats import Histogram
from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.config import MAX_BITS
from msfp.layers.execution.grids import token_sizes
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.trainable import TrainableLayer, untrained_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.ptq.input_visits import Look, look_at_inputs
from msfp.search.layer_search import quantizer_of_input, search_formats
from msfp.search.observers import draw
from msfp.search.schemes import formats_like
from msfp.support.checks import check_seed, check_type, check_whole

SAMPLES = 32
"""Most samples on which scales for each token are compared with one scale."""
TOKENS = 256
"""Most tokens of an input in a forward whose errors are compared."""


def scale_tokens(
    model: DiffusionPipeline | nn.Module,
    *,
    trajectories: Trajectories,
    samples: int = SAMPLES,
    batch: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Give linear layers a scale for each token of their input, in place, where it has less error.

    Layers whose input has 8 bits, or a scale for each channel, keep theirs.

    Args:
        model: A pipeline or its denoiser, quantized by `quantize` and trainable.
        trajectories: Recorded from the full-precision denoiser.
        samples: Largest number of noisy samples to use, spread evenly over the timesteps.
        batch: Largest number of samples in one forward, as for `RefinementConfig`.
        seed: Seed of the draws.

    Returns:
        The names of the layers that got a scale for each token.

    Raises:
        InputError: If the denoiser has no quantized layer, or has one that is packed or has LoRAs,
            or an argument has the wrong type.
    """
    denoiser = denoiser_of(model)
    check_type("trajectories", trajectories, Trajectories)
    check_whole("samples", samples, 1, 10**6)
    if batch is not None:
        check_whole("batch", batch, 1, 10**6)
    check_seed(seed)
    layers = {n: each for n, each in untrained_layers(denoiser).items() if _is_eligible(each)}
    steps, rows = trajectories.samples.shape[:2]
    sample = spread_batch(steps, rows, samples, torch.Generator().manual_seed(seed))

    def look(note: Look) -> None:
        look_at_inputs(denoiser, layers, trajectories, sample, batch, note)

    found = _searched(layers, look)
    better = _better(layers, found, look)
    for name in better:
        layers[name].input_quantizer = found[name]
    attach_again(denoiser)
    return better


def _is_eligible(layer: TrainableLayer) -> bool:
    """Return whether a layer is linear, with an input of less than 8 bits and one scale."""
    inputs = layer.input_quantizer
    return (
        not layer.kind.places
        and inputs is not None
        and inputs.format.bits < MAX_BITS
        and inputs.scale.dim() == 0
    )


def _tokens(layer: TrainableLayer, x: torch.Tensor) -> torch.Tensor:
    """Return what a linear layer rounds of an input, tokens first."""
    return layer.rotated(x).reshape(-1, x.shape[-1])


def _searched(
    layers: Mapping[str, TrainableLayer], look: Callable[[Look], None]
) -> dict[str, Quantizer]:
    """Return the best quantizer with a scale for each token, for each layer that runs."""
    histograms: dict[str, Histogram] = {}
    runs: Counter[str] = Counter()

    def note(name: str, x: torch.Tensor) -> None:
        x = _tokens(layers[name], x)
        relative = draw(x / token_sizes(x), f"{name} {runs[name]}")
        histograms.setdefault(name, Histogram()).update(relative)
        runs[name] += 1

    look(note)
    found = {}
    for name, histogram in histograms.items():
        old = layers[name].input_quantizer
        if old is not None and not histogram.nonfinite:
            grid = quantizer_of_input(search_formats(histogram, formats_like(old.format)))
            new = Quantizer(grid.format, grid.scale, grid.zero_point, by_token=True)
            found[name] = new.to(old.scale.device)
    return found


def _better(
    layers: Mapping[str, TrainableLayer],
    found: Mapping[str, Quantizer],
    look: Callable[[Look], None],
) -> list[str]:
    """Return the names of the layers whose inputs have less squared error with new quantizers."""
    errors: dict[str, list[float]] = {}

    def note(name: str, x: torch.Tensor) -> None:
        if name in found:
            x = _tokens(layers[name], x)
            some = x[:: -(-len(x) // TOKENS)]
            sums = errors.setdefault(name, [0.0, 0.0])
            for index, quantizer in enumerate((layers[name].input_quantizer, found[name])):
                assert quantizer is not None  # noqa: S101 - the layer is eligible
                sums[index] += float((quantizer(some) - some).square().sum())

    look(note)
    return [name for name in layers if name in errors and errors[name][1] < errors[name][0]]
