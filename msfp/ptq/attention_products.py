"""Searching the grids of attention's operands, with data from one forward pass."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats import Choice, Histogram, search
from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.config import MAX_BITS, MIN_BITS
from msfp.errors import InputError
from msfp.layers.attention import (
    OPERANDS,
    AttentionProducts,
    Switch,
    attention_modules,
    attention_products,
    has_zero_point,
)
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.trainable import untrained_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.search.layer_search import search_input
from msfp.search.schemes import float_formats
from msfp.support.checks import check_seed, check_type, check_whole
from msfp.support.hooks import hooked
from msfp.support.offloading import work_device


class _Recorder:
    """Adds the operands to histograms without changing them."""

    def __init__(self) -> None:
        self.histograms = {name: Histogram() for name in OPERANDS}

    def round_operand(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Add an operand to its histogram and return it unchanged."""
        self.histograms[name].update(x.detach())
        return x

    def products(self, bits: int) -> AttentionProducts:
        """Return the quantizers with the formats that fit the operands best."""
        quantizers = {}
        for name in OPERANDS:
            choice = _search(name, self.histograms[name], bits)
            zero = torch.tensor(choice.zero_point) if has_zero_point(name, choice.format) else None
            quantizers[name] = Quantizer(choice.format, torch.tensor(choice.scale), zero)
        return AttentionProducts(quantizers)


def _search(name: str, histogram: Histogram, bits: int) -> Choice:
    if name == "probabilities":
        return search(histogram, float_formats(bits, signed=False))
    return search_input(histogram, bits, "mixup")[0]


@torch.no_grad()
def quantize_attention(
    model: DiffusionPipeline | nn.Module,
    bits: int,
    *,
    trajectories: Trajectories,
    samples: int = 64,
    seed: int = 0,
) -> list[str]:
    """Quantize the products of every attention module in place, with data from one forward pass.

    Args:
        model: A pipeline or its denoiser, quantized by `quantize` and trainable.
        bits: Bits of all four operands.
        trajectories: Recorded from the full-precision denoiser.
        samples: Largest number of noisy samples in the forward pass.
        seed: Seed of the draws.

    Returns:
        The names of the attention modules.

    Raises:
        InputError: If the denoiser is not quantized, is packed or has no attention module, a
            processor does not call scaled dot-product attention, or `bits` is not from 3 to 8. The
            denoiser is then unchanged.
    """
    denoiser = denoiser_of(model)
    check_whole("bits", bits, MIN_BITS, MAX_BITS)
    check_whole("samples", samples, 1, 10**6)
    check_seed(seed)
    check_type("trajectories", trajectories, Trajectories)
    untrained_layers(denoiser)
    if attention_products(denoiser):
        raise InputError("the products of attention are quantized already")
    modules = attention_modules(denoiser)
    if not modules:
        raise InputError(f"{type(denoiser).__name__} has no attention module with a processor")
    recorders = {name: _Recorder() for name in modules}
    generator = torch.Generator().manual_seed(seed)
    steps, rows = trajectories.samples.shape[:2]
    step, row = spread_batch(steps, rows, samples, generator)
    switches = (Switch(modules[name], recorders[name].round_operand) for name in modules)
    with hooked(switches):
        trajectories.predict(denoiser, step, row)
    for name, recorder in recorders.items():
        if not recorder.histograms["query"].count:
            kind = type(modules[name].processor).__name__
            raise InputError(f"{kind} does not call scaled dot-product attention")
    device = work_device(denoiser)
    for name, recorder in recorders.items():
        recorder.products(bits).to(device).attach(modules[name])
    attach_again(denoiser, attention_bits=bits)
    return list(recorders)
