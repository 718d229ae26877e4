"""Quantize a small denoiser of every class that diffusers exports, and write the table of them.

PYTHONPATH=tests/helpers python docs/render_denoisers.py
"""

import copy
import logging
import math
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
from denoisers import CASES, Case  # type: ignore[import-not-found]
from torch import nn

import msfp
from msfp.layers.base import quantized_layers
from msfp.layers.formats import LayerFormats
from msfp.pipelines.trajectories import WholeForwards, as_vector
from msfp.support.hooks import hooked

PAGE = Path(__file__).parent / "denoisers.md"
TITLE = f"""# Every denoiser of diffusers

Small models with random weights, of every class that diffusers {diffusers.__version__} exports:
denoisers, control networks and adapters. Each was quantized by the default recipe, refined on one
call, packed, saved and loaded. `tests/msfp/test_every_denoiser.py` repeats this;
`docs/render_denoisers.py` writes this page.

- **rows**: "joined" if samples of several calls are put into one batch, "whole" if each recorded
  forward is run by itself, which is slower.
- **4 bits**: share of parameters, and of multiply-adds of layers, in layers with 4-bit weights. The
  layers that read the sample and write the prediction have 8 bits. Small models have more of them
  than large ones.
- **not quantized**: number of linear layers and convolutions that stay in full precision, because
  the call does not run them or they are of another class.
- **SQNR**: signal-to-quantization-noise ratio of the output on that call, in dB. It says that the
  quantized model works. Random weights say nothing on quality.

| class | rows | 4 bits, parameters | 4 bits, multiply-adds | not quantized | SQNR, dB |
|---|---|--:|--:|--:|--:|
"""
PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)


def multiply_adds(case: Case, denoiser: nn.Module) -> Counter[str]:
    """Count the multiply-adds of each layer in a call."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Any:
        def hook(layer: Any, _args: Any, output: torch.Tensor) -> None:
            counts[name] += output.numel() * math.prod(layer.weight.shape[1:])

        return hook

    layers = ((n, m) for n, m in denoiser.named_modules() if isinstance(m, PRODUCTS))
    with hooked([layer.register_forward_hook(count(name)) for name, layer in layers]):
        case.call(denoiser)
    return counts


def row(name: str, case: Case) -> str:
    """Return the row of a class in the table."""
    if case.reason:
        return f"| {name} | {case.reason} | | | | |\n"
    full = case.make(name)
    before = as_vector(case.call(full)).double()
    whole = isinstance(msfp.record_trajectories(full, calls=case.call), WholeForwards)
    denoiser = copy.deepcopy(full)
    msfp.quantize(denoiser, calibration=case.call)
    msfp.pack(denoiser)
    error = as_vector(case.call(denoiser)).double() - before
    layers = quantized_layers(denoiser)
    formats = {name: layer.formats for name, layer in layers.items()}
    narrow = {
        name
        for name, each in formats.items()
        if isinstance(each, LayerFormats) and each.weight.bits == 4
    }
    products = {n: m for n, m in full.named_modules() if isinstance(m, PRODUCTS)}
    counts = multiply_adds(case, full)
    held = sum(products[each].weight.numel() for each in narrow)
    shares = (
        held / sum(parameter.numel() for parameter in full.parameters()),
        sum(counts[each] for each in narrow) / max(1, counts.total()),
    )
    sqnr = 10 * math.log10(before.square().sum() / error.square().sum())
    cells = [name, "whole" if whole else "joined", *(f"{share:.0%}" for share in shares)]
    return f"| {' | '.join(cells)} | {len(products) - len(layers)} | {sqnr:.1f} |\n"


def main() -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for number, (name, case) in enumerate(sorted(CASES.items()), 1):
        print(f"{number} of {len(CASES)}: {name}", file=sys.stderr)
        rows.append(row(name, case))
    PAGE.write_text(TITLE + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
