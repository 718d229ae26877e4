"""Mixup-sign post-training quantization: the search of one layer's grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fpformats import Choice, FloatFormat, Histogram, search
from fpformats.fitting.search import RATIOS, ZERO_POINTS
from msfp.config import BLOCK_SCHEMES, MAX_BITS, LayerSettings, Scheme
from msfp.errors import InputError
from msfp.layers.block import BlockLayer
from msfp.layers.branch_factor import INPUT_FORMAT
from msfp.layers.execution.grids import fits_byte
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.families import family_of
from msfp.layers.formats import BlockFormats
from msfp.layers.kinds import PlainLayer
from msfp.layers.packed import PackedLayer
from msfp.layers.trainable import TrainableLayer
from msfp.layers.trainable_block import TrainableBlockLayer
from msfp.search.calibration import Calibration
from msfp.search.schemes import SCHEMES, BlockScheme, scaled_scheme
from msfp.search.summary import LayerSummary
from msfp.support.decibels import sqnr

ASYMMETRY = 0.4
"""Inputs are asymmetric if the energy of negatives over that of positives is below this ratio.

For normal numbers of standard deviation 1 the ratio is 0.07 after SiLU and 0.02 after GELU. For
inputs without an activation function it is rarely below 0.5.
"""
WEIGHT_RATIOS = np.linspace(0.3, 1.0, 36)
"""Clipping ratios to search for weights.

Rows are short and nearly normal, so the best ratio is never far below 1.
"""
NO_CLIP = np.ones(1)
MAX_EXCESS = 1.02
"""A format that fits a byte in steps is preferred up to this multiple of the least error.

Such layers run on integer units.
"""


MIN_BRANCH_SQNR = 34.0
"""Least SQNR in dB of the input of a branch in 8 bits.

Without it, 8 bits raised the error of the photographs' noise predictions by half; with it, by 1 %.
"""


def is_asymmetric(inputs: Histogram) -> bool:
    """Return whether negative inputs have much less energy than positive ones.

    The energy is the sum of squares. Neither the unit of the inputs nor single outliers decide the
    result.
    """
    _, sums, squares = inputs.bins()
    return bool(squares[sums < 0].sum() < ASYMMETRY * squares[sums > 0].sum())


def search_input(inputs: Histogram, bits: int, name: Scheme) -> tuple[Choice, Choice]:
    """Return the best choice of grid for a layer's input, and the best signed choice.

    Args:
        inputs: Histogram of the layer's input.
        bits: Width of the formats.
        name: Name of the scheme, which must not be a block scheme.
    """
    scheme = scaled_scheme(name)
    formats = scheme.formats(bits, signed=True)
    if scheme.unsigned and is_asymmetric(inputs):
        formats += scheme.formats(bits, signed=False)
    choice = search_formats(inputs, formats, clips=scheme.clips)
    signed = (each for fmt, each in choice.by_format.items() if fmt.signed)
    return choice, min(signed, key=lambda each: each.squared_error)


def search_formats(
    inputs: Histogram, formats: Sequence[FloatFormat], *, clips: bool = True
) -> Choice:
    """Return the best choice of grid among formats for an input.

    Args:
        inputs: Histogram of the input.
        formats: The formats; unsigned ones get a zero point.
        clips: Whether scales are searched, as in `ScaledScheme`.
    """
    choice = search(
        inputs,
        formats,
        ratios=RATIOS if clips else NO_CLIP,
        zero_points=ZERO_POINTS,
        refine=clips,
        whole_zero_points=True,
    )
    return _for_integer_units(choice)


def grid_of_branch(inputs: Histogram) -> tuple[float, float] | None:
    """Return scale and zero point of the input of a low-rank branch in 8 bits, which clips nothing.

    It is None if the SQNR of the input would be below `MIN_BRANCH_SQNR`: a branch has the largest
    part of a weight, and passes on the error of its input.

    Args:
        inputs: Histogram of the layer's input.
    """
    choice = search(
        inputs,
        [INPUT_FORMAT],
        ratios=NO_CLIP,
        zero_points=NO_CLIP,
        refine=False,
        whole_zero_points=True,
    )
    signal = float(inputs.bins().squares.sum())
    if sqnr(signal, choice.squared_error) < MIN_BRANCH_SQNR:
        return None
    return float(choice.scale), float(choice.zero_point)


def search_weight(
    weight: torch.Tensor, settings: LayerSettings
) -> tuple[Quantizer, dict[str, float]]:
    """Return the quantizer of a weight, and the best SQNR in dB of each format.

    Args:
        weight: Float32, finite, output channels first.
        settings: What to search. The quantizer has a scale for each output channel; all scales
            are equal if the granularity is the tensor.
    """
    scheme = scaled_scheme(settings.scheme)
    choice = search(
        weight,
        scheme.formats(settings.weight_bits, signed=True),
        ratios=WEIGHT_RATIOS if scheme.clips else NO_CLIP,
        axis=0 if settings.granularity == "channel" else None,
        refine=scheme.clips,
    )
    choice = _for_integer_units(choice)
    shape = (len(weight), *(1,) * (weight.dim() - 1))
    scale = torch.as_tensor(choice.scale, dtype=torch.float32, device=weight.device)
    return Quantizer(choice.format, scale.expand(shape)), _table(choice.by_format, energy(weight))


def _for_integer_units(choice: Choice) -> Choice:
    """Return a choice whose format fits a byte in steps, if its error is almost as small."""
    fitting = [each for fmt, each in choice.by_format.items() if fits_byte(fmt)]
    if fits_byte(choice.format) or not fitting:
        return choice
    best = min(fitting, key=lambda each: each.squared_error)
    if best.squared_error > MAX_EXCESS * choice.squared_error:
        return choice
    return replace(best, by_format=choice.by_format)


def energy(x: torch.Tensor) -> float:
    """Return the sum of squares."""
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)  # without a float64 copy
    return float(norm) ** 2


def _table(choices: Mapping[FloatFormat, Choice], signal: float) -> dict[str, float]:
    """Return the SQNR in dB of each format."""
    return {str(fmt): sqnr(signal, each.squared_error) for fmt, each in choices.items()}


def finite_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a layer's weight in float32; raise InputError if it is empty or not finite."""
    if weight.is_meta:
        raise InputError(f"the weight of layer {name!r} has no numbers: it is on the meta device")
    if not weight.isfinite().all():
        raise InputError(f"the weight of layer {name!r} is not finite")
    return weight.detach().float()


def quantize_layer(
    name: str,
    layer: PlainLayer,
    settings: LayerSettings,
    calibration: Calibration | None,
    *,
    refined: bool = False,
) -> tuple[TrainableLayer | BlockLayer, LayerSummary]:
    """Search the grids of one layer.

    Args:
        name: Name of the layer.
        layer: The plain layer.
        settings: What to search.
        calibration: Histograms of layer inputs; not needed if inputs are not quantized.
        refined: Whether the layer is to be refined. In block formats it is packed at once if not.

    Returns:
        The trainable quantized layer or the block layer, and a summary of the search.
    """
    weight = finite_weight(name, layer.weight)
    if isinstance(SCHEMES[settings.scheme], BlockScheme):
        if refined:
            return _trainable_block_layer(name, layer, weight, settings)
        return _block_layer(name, layer, weight, settings)
    weight_quantizer, summary = _searched(name, weight, settings)
    input_quantizer = branch_grid = None
    if settings.activation_bits is not None and calibration is not None:
        inputs = calibration.inputs[name]
        choice, signed = search_input(inputs, settings.activation_bits, settings.scheme)
        input_quantizer = quantizer_of_input(choice).to(weight.device)
        narrow = max(settings.weight_bits, settings.activation_bits) < MAX_BITS
        # With the factor of a branch, products of matrices are as fast in floating point.
        if narrow and math.prod(getattr(layer, "kernel_size", ())) > 1:
            branch_grid = grid_of_branch(inputs)
        activation = calibration.activations.get(name)
        summary = replace(summary, activation=activation, **_facts(inputs, choice, signed))
    grids = weight_quantizer, input_quantizer, branch_grid
    return family_of(layer).trainable.wrap(layer, *grids), summary


def pack_layer(
    name: str, layer: nn.Module, weight: torch.Tensor, settings: LayerSettings
) -> tuple[PackedLayer, LayerSummary]:
    """Search the grid of one layer's weight and pack it, without calibration.

    Args:
        name: Name of the layer.
        layer: The plain layer to replace, which may be on the meta device.
        weight: The weight to pack.
        settings: What to search. Inputs are quantized only in block formats.

    Returns:
        The packed layer, and a summary of the search.
    """
    values = finite_weight(name, weight)
    if isinstance(SCHEMES[settings.scheme], BlockScheme):
        return _block_layer(name, layer, values, settings)
    quantizer, summary = _searched(name, values, settings)
    return family_of(layer).packed.of_weights(layer, [weight], quantizer, None), summary


def _searched(
    name: str, weight: torch.Tensor, settings: LayerSettings
) -> tuple[Quantizer, LayerSummary]:
    """Return the quantizer of a weight, and a summary of the weight alone."""
    quantizer, table = search_weight(weight, settings)
    chosen = str(quantizer.format)
    return quantizer, LayerSummary(name, chosen, table[chosen], table)


def _block_layer(
    name: str, layer: nn.Module, weight: torch.Tensor, settings: LayerSettings
) -> tuple[BlockLayer, LayerSummary]:
    """Return the packed block layer, with the scales of the format's rule, and its summary."""
    formats = _block_formats(settings)
    blocks = family_of(layer).block.of_weight(layer, weight, formats)
    return blocks, _block_summary(name, formats, weight, blocks)


def _trainable_block_layer(
    name: str, layer: PlainLayer, weight: torch.Tensor, settings: LayerSettings
) -> tuple[TrainableBlockLayer, LayerSummary]:
    """Return the trainable block layer, whose scales are searched, and its summary."""
    formats = _block_formats(settings)
    blocks = family_of(layer).trainable_block.of(layer, weight, formats)
    return blocks, _block_summary(name, formats, weight, blocks)


def _block_formats(settings: LayerSettings) -> BlockFormats:
    names, bits = BLOCK_SCHEMES[settings.scheme], settings.activation_bits
    return BlockFormats(names[settings.weight_bits], None if bits is None else names[bits])


def _block_summary(
    name: str, formats: BlockFormats, weight: torch.Tensor, layer: BlockLayer | TrainableBlockLayer
) -> LayerSummary:
    noise = layer.quantized_weight(dtype=torch.float32).detach() - weight
    quality = sqnr(energy(weight), energy(noise))
    return LayerSummary(name, formats.weight, quality, {formats.weight: quality}, formats.input)


def quantizer_of_input(choice: Choice) -> Quantizer:
    """Return the quantizer with the grid that was found for an input."""
    zero = None if choice.zero_point is None else torch.tensor(choice.zero_point)
    return Quantizer(choice.format, torch.tensor(choice.scale), zero)


def _facts(inputs: Histogram, choice: Choice, signed: Choice) -> dict[str, Any]:
    """Return the fields of a summary that describe a layer's input."""
    signal = float(inputs.bins().squares.sum())
    return {
        "input_format": str(choice.format),
        "input_scale": choice.scale,
        "input_zero_point": choice.zero_point,
        "asymmetric": is_asymmetric(inputs),
        "input_sqnr": sqnr(signal, choice.squared_error),
        "signed_input_sqnr": sqnr(signal, signed.squared_error),
        "input_choices": _table(choice.by_format, signal),
    }
