"""Separate scales for the parts of a concatenated input.

Where a UNet's up path concatenates a skip connection with what comes from below, the two have
ranges of their own, and one scale for both wastes values on the narrower (Q-Diffusion, Li et al.,
ICCV 2023). A layer that reads the concatenation as it is gets one scale for each part, held as a
scale for each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fpformats.search import Choice, SortedTensor, search_tensor
from msfp.fine_tuning import draw_batch
from msfp.layers import QuantizedLayer, quantized_layers
from msfp.post_training import float_formats
from msfp.quantizer import Quantizer
from msfp.sampling import Trajectories

SAMPLES_PER_PART = 2**17


class _Concatenations(TorchFunctionMode):
    """Inside the block, keeps every concatenation of channels and the sizes of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, list[int]]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function; note what it was if it concatenates images along channels."""
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate) and result.dim() == 4:
            parts = args[0] if args else (kwargs or {})["tensors"]
            sizes = [part.shape[1] for part in parts]
            if sum(sizes) == result.shape[1] and len(sizes) > 1:
                self.found.append((result, sizes))
        return result

    def parts(self, x: torch.Tensor) -> list[int] | None:
        """Return the sizes of the parts of a tensor, or None if it is not a concatenation."""
        for result, sizes in self.found:
            if x.data_ptr() == result.data_ptr() and x.shape == result.shape:
                return sizes
        return None


def concatenated_inputs(
    denoiser: nn.Module, sample: torch.Tensor, timestep: torch.Tensor
) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """Return the layers that read a concatenation, what they read, and the sizes of its parts."""
    found: dict[str, tuple[torch.Tensor, list[int]]] = {}
    concatenations = _Concatenations()

    def hook(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
            sizes = concatenations.parts(args[0])
            if sizes is not None:
                found[name] = args[0].detach(), sizes

        return look

    layers = quantized_layers(denoiser)
    handles = [layers[name].register_forward_pre_hook(hook(name)) for name in layers]
    try:
        with concatenations:
            denoiser(sample, timestep)
    finally:
        for handle in handles:
            handle.remove()
    return found


def split_quantizer(
    x: torch.Tensor, sizes: Sequence[int], bits: int, generator: torch.Generator
) -> Quantizer:
    """Return the signed quantizer with one format and, for each part of the channels, a scale.

    Args:
        x: Values, shape (batch, channels, height, width).
        sizes: Channels of each part.
        bits: Width of the format.
        generator: Source of the draw of values to search on.
    """
    parts = [_sorted(part, generator) for part in x.split(list(sizes), dim=1)]
    choices: list[list[Choice]] = [
        [search_tensor(part, [fmt]) for part in parts] for fmt in float_formats(bits, signed=True)
    ]
    best = min(choices, key=lambda found: sum(choice.squared_error for choice in found))
    scales = torch.tensor([choice.scale for choice in best], device=x.device)
    each = scales.repeat_interleave(torch.tensor(sizes, device=x.device))
    return Quantizer(best[0].format, each[:, None, None])


def _sorted(part: torch.Tensor, generator: torch.Generator) -> SortedTensor:
    values = part.float().flatten().cpu()
    drawn = torch.randint(len(values), (SAMPLES_PER_PART,), generator=generator)
    return SortedTensor(np.append(values[drawn].numpy(), torch.stack(values.aminmax()).numpy()))


@torch.no_grad()
def split_inputs(
    denoiser: nn.Module, trajectories: Trajectories, *, samples: int = 64, seed: int = 0
) -> list[str]:
    """Give every layer that reads a concatenation, with a signed format, a scale for each part.

    Args:
        denoiser: Quantized by `quantize`, open; changed in place.
        trajectories: Recorded from the full-precision denoiser.
        samples: Noisy samples to look at, of all timesteps alike.
        seed: Seed of the draws.

    Returns:
        The names of the layers whose input was split.
    """
    generator = torch.Generator().manual_seed(seed)
    steps, count = trajectories.samples.shape[:2]
    step, trajectory = draw_batch(steps, count, samples, generator)
    inputs = concatenated_inputs(
        denoiser, trajectories.samples[step, trajectory], trajectories.timesteps[step]
    )
    split = []
    for name, (x, sizes) in inputs.items():
        layer: QuantizedLayer = denoiser.get_submodule(name)  # type: ignore[assignment]
        fmt = layer.input_quantizer.format
        if fmt.signed:
            layer.input_quantizer = split_quantizer(x, sizes, fmt.bits, generator)
            split.append(name)
    return split
