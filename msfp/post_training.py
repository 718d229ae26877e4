"""Mixup-sign post-training quantization: the search of one layer's grids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fpformats import FloatFormat, Specials
from fpformats.search import RATIOS, ZERO_POINTS, Choice, search
from msfp.config import Scheme
from msfp.denoiser import PlainLayer
from msfp.errors import InputError
from msfp.open_layers import OPEN_LAYERS, OpenLayer
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
        weight,
        candidates(bits, scheme, signed=True),
        ratios=WEIGHT_RATIOS if clips else NO_CLIP,
        axis=0,
        refine=clips,
    )
    signal = weight.double().square().sum().item()
    return Quantizer(choice.format, choice.scale), sqnr(signal, choice.squared_error)


def finite_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a layer's weight in float32; raise InputError if it is offloaded or not finite."""
    if weight.is_meta:
        raise InputError(f"the weight of layer {name!r} is offloaded: quantize before offloading")
    if not weight.isfinite().all():
        raise InputError(f"the weight of layer {name!r} is not finite")
    return weight.detach().float()


def quantize_layer(
    name: str,
    layer: PlainLayer,
    inputs: NDArray[np.float32] | None,
    bits: tuple[int, int | None],
    scheme: Scheme,
) -> tuple[OpenLayer, LayerSummary]:
    """Search the grids of one layer.

    Args:
        name: Its name.
        layer: The plain layer.
        inputs: Values of its input; not needed where inputs have no bits.
        bits: Bits of weights and inputs.
        scheme: What to search.

    Returns:
        The open quantized counterpart, and what was found.
    """
    weight = finite_weight(name, layer.weight)
    weight_quantizer, weight_sqnr = search_weight(weight, bits[0], scheme)
    summary = LayerSummary(name, str(weight_quantizer.format), weight_sqnr=weight_sqnr)
    input_quantizer = None
    if bits[1] is not None and inputs is not None:
        choice, signed = search_input(inputs, bits[1], scheme)
        zero = None if choice.zero_point is None else torch.tensor(choice.zero_point)
        quantizer = Quantizer(choice.format, torch.tensor(choice.scale), zero)
        input_quantizer = quantizer.to(weight.device)
        signal = float(np.square(inputs, dtype=np.float64).sum())
        summary = replace(
            summary,
            input_format=str(choice.format),
            input_scale=choice.scale,
            input_zero_point=choice.zero_point,
            asymmetric=is_asymmetric(inputs),
            input_sqnr=sqnr(signal, choice.squared_error),
            signed_input_sqnr=sqnr(signal, signed.squared_error),
        )
    return OPEN_LAYERS[type(layer)].wrap(layer, weight_quantizer, input_quantizer), summary
