"""Mixup-sign post-training quantization: search each layer's grids, then swap the layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import nn

from fpformats import FloatFormat, Specials
from fpformats.search import RATIOS, ZERO_POINTS, Choice, search
from msfp.calibration import Calibration
from msfp.config import QuantizationConfig, Scheme
from msfp.denoiser import (
    FIRST_LAYERS,
    LAST_LAYERS,
    denoiser_of,
    position,
    quantizable_layers,
    replace_layer,
)
from msfp.errors import InputError
from msfp.layers import QuantizedLayer, quantized_class, quantized_layers
from msfp.quantizer import Quantizer
from msfp.summary import LayerSummary

MAX_EXPONENT_BITS = 5
LEAST_MINIMUM = -0.3
"""Below the minima of SiLU (-0.278) and GELU (-0.170)."""
WEIGHT_RATIOS = np.linspace(0.3, 1.0, 36)
"""Clips of weights: rows are short and near normal, so that the best one is never far below 1."""
NO_CLIP = np.ones(1)


def float_formats(bits: int, *, signed: bool) -> list[FloatFormat]:
    """Return the finite-only formats of a width, from the finest mantissa to the widest range.

    Example:
        >>> [str(fmt) for fmt in float_formats(4, signed=False)]
        ['E1M3U', 'E2M2U', 'E3M1U', 'E4M0U']
    """
    free = bits - signed
    return [
        FloatFormat(e, free - e, signed=signed, specials=Specials.FINITE_ONLY)
        for e in range(1, min(free, MAX_EXPONENT_BITS) + 1)
    ]


def integer_format(bits: int, *, signed: bool = True) -> FloatFormat:
    """Return the integers of a width as a format, symmetric if signed: E0My has a uniform step.

    Example:
        >>> integer_format(4).values().tolist() == [v / 4 for v in range(-7, 8)]
        True
    """
    return FloatFormat(0, bits - signed, signed=signed, specials=Specials.FINITE_ONLY)


def candidates(bits: int, scheme: Scheme, *, signed: bool) -> list[FloatFormat]:
    """Return the formats that a scheme chooses from."""
    if scheme in ("signed", "mixup"):
        return float_formats(bits, signed=signed)
    return [integer_format(bits, signed=signed)]


def sqnr(signal: float, noise: float) -> float:
    """Return the ratio of two sums of squares in decibels, at most 200."""
    return float(10 * np.log10(max(signal, 1e-300) / max(noise, signal * 1e-20, 1e-300)))


def is_asymmetric(inputs: NDArray[np.float32]) -> bool:
    """Return whether values reach down no further than SiLU does, and up well beyond that."""
    low, high = float(inputs.min()), float(inputs.max())
    return low >= LEAST_MINIMUM and high > 2 * abs(low)


def search_input(inputs: NDArray[np.float32], bits: int, scheme: Scheme) -> tuple[Choice, Choice]:
    """Return the best choice for a layer's input, and the best signed one."""
    clips = scheme != "int_minmax"
    formats = candidates(bits, scheme, signed=True)
    if scheme in ("mixup", "int_zero_point") and is_asymmetric(inputs):
        formats += candidates(bits, scheme, signed=False)
    choice = search(
        inputs,
        formats,
        ratios=RATIOS if clips else NO_CLIP,
        zero_points=ZERO_POINTS,
        refine=clips,
    )
    signed = (each for fmt, each in choice.by_format.items() if fmt.signed)
    return choice, min(signed, key=lambda each: each.squared_error)


def search_weight(weight: torch.Tensor, bits: int, scheme: Scheme) -> tuple[Quantizer, float]:
    """Return the quantizer of a weight, one scale for each output channel, and its SQNR."""
    clips = scheme != "int_minmax"
    choice = search(
        weight.detach(),
        candidates(bits, scheme, signed=True),
        ratios=WEIGHT_RATIOS if clips else NO_CLIP,
        axis=0,
        refine=clips,
    )
    signal = weight.double().square().sum().item()
    return Quantizer(choice.format, choice.scale), sqnr(signal, choice.squared_error)


def quantize_layer(
    name: str, layer: nn.Conv2d | nn.Linear, inputs: NDArray[np.float32], config: QuantizationConfig
) -> QuantizedLayer:
    """Search the grids of one layer and return its open quantized counterpart."""
    weight_bits, input_bits = config.bits(position(name))
    choice, signed = search_input(inputs, input_bits, config.scheme)
    device = layer.weight.device
    zero = None if choice.zero_point is None else torch.tensor(choice.zero_point, device=device)
    weight_quantizer, weight_sqnr = search_weight(layer.weight, weight_bits, config.scheme)
    input_quantizer = Quantizer(choice.format, torch.tensor(choice.scale, device=device), zero)
    signal = float(np.square(inputs, dtype=np.float64).sum())
    summary = LayerSummary(
        name=name,
        weight_format=str(weight_quantizer.format),
        input_format=str(choice.format),
        input_scale=choice.scale,
        input_zero_point=choice.zero_point,
        asymmetric=is_asymmetric(inputs),
        weight_sqnr=weight_sqnr,
        input_sqnr=sqnr(signal, choice.squared_error),
        signed_input_sqnr=sqnr(signal, signed.squared_error),
    )
    return quantized_class(layer).wrap(layer, weight_quantizer, input_quantizer, summary)


def quantize(
    pipe: DiffusionPipeline,
    config: QuantizationConfig,
    *,
    calibration: Calibration,
    progress: Callable[[str], None] | None = None,
) -> list[LayerSummary]:
    """Quantize the denoiser of a pipeline in place.

    Args:
        pipe: The pipeline; every Conv2d and Linear of its denoiser is swapped for an open
            quantized layer that shares its parameters.
        config: Bit widths and scheme.
        calibration: Inputs collected by `calibrate` on the same denoiser.
        progress: Called with each layer's name once it is searched.

    Returns:
        What was chosen, one summary for each layer.

    Raises:
        InputError: If the pipeline has no denoiser or one that is quantized already, no layer is
            the first or last though they are to have other bits, or the calibration is of
            another denoiser. The pipeline is then as it was.
    """
    denoiser = denoiser_of(pipe)
    layers = quantizable_layers(denoiser)
    if quantized_layers(denoiser):
        raise InputError("the denoiser is quantized already: quantize a full-precision one")
    if config.first_last != config.weights and all(position(n) == "inner" for n in layers):
        raise InputError(
            f"{type(denoiser).__name__} has no layer named {FIRST_LAYERS[0]} or {LAST_LAYERS[0]}, "
            "so first_last cannot be applied: set it to the bits of the weights"
        )
    missing = [name for name in layers if name not in calibration.inputs]
    if missing:
        raise InputError(
            f"calibration has no inputs for the layer {missing[0]!r}: it must be collected on the "
            "denoiser that is quantized"
        )
    searched = []
    for name, layer in layers.items():
        searched.append(quantize_layer(name, layer, calibration.inputs[name], config))
        if progress is not None:
            progress(name)
    for quantized in searched:
        replace_layer(denoiser, quantized.summary.name, quantized)
    return [quantized.summary for quantized in searched]
