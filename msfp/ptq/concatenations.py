"""Separate scales for the parts of a concatenated input.

The up path of a UNet concatenates a skip connection with the features from the level below. The two
parts have different ranges, and a common scale wastes values on the narrower part (Q-Diffusion, Li
et al., ICCV 2023). A layer whose input is such a concatenation of channels gets one scale for each
part. It is stored as a scale for each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from fpformats import FloatFormat, Histogram, search
from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.kinds import groups_of, kind_of
from msfp.layers.trainable import untrained_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.ptq.side_by_side import forwards_of
from msfp.search.activation_trace import has_memory
from msfp.search.schemes import formats_like
from msfp.support.checks import check_seed, check_type, check_whole
from msfp.support.hooks import hooked

CONCATENATE = (torch.cat, torch.concat, torch.concatenate)


class _Concatenation(NamedTuple):
    """The result of a concatenation, which is not kept in memory.

    Attributes:
        memory: Its memory.
        place: Its address, its shape and the dimension of its parts.
        sizes: Sizes of the parts.
    """

    memory: StorageWeakRef
    place: tuple[int, tuple[int, ...], int]
    sizes: list[int]


class _Concatenations(TorchFunctionMode):
    """Records each concatenation, its dimension and the sizes of its parts in a `with` block.

    Vectors are not recorded: the sine and cosine of a timestep are concatenated too, but have the
    same range.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Concatenation] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function, and record its result if it is a concatenation."""
        result = func(*args, **(kwargs or {}))
        if func in CONCATENATE and has_memory(result):
            self._note(result, *args, **(kwargs or {}))
        return result

    def _note(
        self, result: torch.Tensor, tensors: Sequence[torch.Tensor], dim: int = 0, **_: Any
    ) -> None:
        sizes = [part.shape[dim] for part in tensors if part.dim() == result.dim()]
        if len(sizes) == len(tensors) > 1 and result.dim() > 2:
            memory = StorageWeakRef(result.untyped_storage())
            place = result.data_ptr(), tuple(result.shape), dim % result.dim()
            self.found = [each for each in self.found if not each.memory.expired()]
            self.found.append(_Concatenation(memory, place, sizes))

    def parts(self, x: torch.Tensor, dim: int) -> list[int] | None:
        """Return the sizes of the parts of a tensor, or None if it is not a concatenation."""
        place = x.data_ptr(), tuple(x.shape), dim
        for each in self.found:
            if each.place == place and not each.memory.expired():
                return each.sizes
        return None


@torch.no_grad()
def concatenated_inputs(
    denoiser: nn.Module,
    trajectories: Trajectories,
    step: torch.Tensor,
    row: torch.Tensor,
    batch: int | None = None,
) -> dict[str, dict[int, Histogram]]:
    """Return histograms of the inputs that are concatenations, by layer, and by part.

    The key of a part is its first channel. A layer whose parts differ between forwards is left out.
    """
    found: dict[str, dict[int, Histogram]] = {}
    sizes: dict[str, list[int]] = {}
    mixed: set[str] = set()
    concatenations = _Concatenations()

    def hook(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: torch.Tensor = args[0] if args else kwargs["input"]
            axis = kind_of(layer).channel_axis(x)
            parts = concatenations.parts(x, axis)
            if parts is None or parts != sizes.setdefault(name, parts):
                mixed.add(name)
                return
            starts = [sum(parts[:index]) for index in range(len(parts))]
            histograms = found.setdefault(name, {start: Histogram() for start in starts})
            for histogram, part in zip(histograms.values(), x.split(parts, axis), strict=True):
                histogram.update(part.detach())

        return look

    layers = untrained_layers(denoiser)
    hooks = (
        layers[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in layers
    )
    with hooked(hooks):
        for part in forwards_of(trajectories, step, batch):
            with concatenations:
                trajectories.predict(denoiser, step[part], row[part])
    return {name: parts for name, parts in found.items() if name not in mixed}


def split_quantizer(
    layer: nn.Module, parts: Mapping[int, Histogram], formats: Sequence[FloatFormat]
) -> Quantizer:
    """Return a quantizer with one format, and a scale for each part of the channels.

    Args:
        layer: The layer whose input is quantized.
        parts: Histogram of each part of its input, by the first channel of the part.
        formats: Signed formats to choose from.
    """
    kind, weight = kind_of(layer), layer.get_parameter("weight")
    choices = [search(histogram, formats).by_format for histogram in parts.values()]
    best = min(formats, key=lambda fmt: sum(found[fmt].squared_error for found in choices))
    scales = torch.tensor([found[best].scale for found in choices], device=weight.device)
    starts = [*parts, weight.shape[1] * groups_of(layer)]
    sizes = torch.tensor(starts, device=weight.device).diff()
    return Quantizer(best, scales.repeat_interleave(sizes).view(-1, *(1,) * kind.places))


def split_inputs(
    model: DiffusionPipeline | nn.Module,
    *,
    trajectories: Trajectories,
    samples: int = 64,
    batch: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Give each layer with a concatenated input one scale for each part of it, in place.

    Layers with an unsigned input keep their single scale and zero point.

    Args:
        model: A pipeline or its denoiser, quantized by `quantize` and trainable.
        trajectories: Recorded from the full-precision denoiser.
        samples: Largest number of noisy samples to use, spread evenly over the timesteps.
        batch: Largest number of samples in one forward, as for `RefinementConfig`.
        seed: Seed of the draws.

    Returns:
        The names of the layers whose input was split.

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
    steps, rows = trajectories.samples.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    step, row = spread_batch(steps, rows, samples, generator)
    layers = untrained_layers(denoiser)
    split = []
    for name, parts in concatenated_inputs(denoiser, trajectories, step, row, batch).items():
        old = layers[name].input_quantizer
        if old is not None and old.format.signed and layers[name].rotation == 1:
            formats = formats_like(old.format)
            layers[name].input_quantizer = split_quantizer(layers[name], parts, formats)
            split.append(name)
    attach_again(denoiser)
    return split
