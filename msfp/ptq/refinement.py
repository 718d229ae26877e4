"""Correcting the weights and biases of a quantized denoiser, layer after layer, in one forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats import quantize_scaled
from msfp.checkpoint.diffusers_quantizer import attach_anew
from msfp.config import RefinementConfig, check_type
from msfp.errors import InputError
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.trainable import OpenLayer, untrained_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.ptq.concatenations import split_inputs
from msfp.ptq.correction import matched_bias, matched_matrix
from msfp.ptq.low_rank_branches import add_branches
from msfp.ptq.moments import as_matrix, layer_moments
from msfp.ptq.rounding.adaround import adaround
from msfp.ptq.rounding.gptq import damped, gptq, upper_factor
from msfp.ptq.side_by_side import Meeting, meet_layers
from msfp.ptq.weight_search import search_scales
from msfp.search.layer_search import float_formats

FEWEST_SAMPLES, MOST_SAMPLES, MOST_NUMBERS = 64, 256, 2**20
"""Samples in one forward where none are asked for, and the most numbers in all of them."""


class _Refiner:
    """Refines each layer that it meets; all is computed in float32, whatever the dtype.

    Args:
        config: What is corrected and how.
        biased: Names of the layers whose bias is corrected.
        progress: Called with each layer's name.
    """

    def __init__(
        self, config: RefinementConfig, biased: set[str], progress: Callable[[str], None] | None
    ) -> None:
        self.config, self.biased, self.progress = config, biased, progress
        self.generator = torch.Generator().manual_seed(config.seed)

    def __call__(self, meeting: Meeting) -> None:
        layer, config = meeting.layer, self.config
        _check_finite(meeting)
        # The branch reads what is not rounded, and so makes up for its own errors.
        wanted = -layer.add_branch(meeting.inputs, -meeting.outputs)
        moments = layer_moments(
            layer,
            layer.quantize_input(meeting.inputs).float(),
            wanted.float(),
            most=config.positions,
            generator=self.generator,
        )
        matrix = as_matrix(layer, layer.weight.float())
        centred = meeting.name in self.biased and layer.bias is not None
        second = damped(moments.second(centred=centred), config.damping)
        upper = _upper_factor(second, meeting.name, config.damping)
        if config.match_inputs:
            matrix = matched_matrix(matrix, moments, upper, centred=centred)
        if config.scales != "weight":
            self._search(matrix, second, layer)
        matrix = self._rounded(matrix, second, upper, layer)
        layer.weight = _parameter(matrix, layer.weight)
        if centred:
            layer.bias = _parameter(matched_bias(matrix, moments), layer.bias)
        if self.progress is not None:
            self.progress(meeting.name)

    def _search(self, matrix: torch.Tensor, second: torch.Tensor, layer: OpenLayer) -> None:
        """Give a layer the format and scales that serve its output best."""
        old = layer.weight_quantizer
        formats = [old.format]
        if old.format.exponent_bits:  # not integers
            formats = float_formats(old.format.bits, signed=True)
        if self.config.scales == "diagonal":
            second = second.diagonal(dim1=-2, dim2=-1)
        fmt, scale = search_scales(matrix, second, formats)
        layer.weight_quantizer = Quantizer(fmt, scale.reshape(old.scale.shape))

    def _rounded(
        self, matrix: torch.Tensor, second: torch.Tensor, upper: torch.Tensor, layer: OpenLayer
    ) -> torch.Tensor:
        fmt = layer.weight_quantizer.format
        scale = layer.weight_quantizer.scale.view(*matrix.shape[:2], 1)
        if self.config.rounding == "gptq":
            return gptq(matrix, second, fmt, scale, sweeps=self.config.sweeps, upper=upper)
        if self.config.rounding == "adaround":
            return adaround(matrix, second, fmt, scale)
        rounded: torch.Tensor = quantize_scaled(matrix.contiguous(), fmt, scale)
        return rounded


def _parameter(values: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """Return values as a parameter of the shape and dtype of another."""
    return nn.Parameter(values.reshape(like.shape).to(like.dtype), requires_grad=False)


def _upper_factor(second: torch.Tensor, name: str, damping: float) -> torch.Tensor:
    """Return the upper factor of what a layer's second moments are with some damping."""
    try:
        return upper_factor(second)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InputError(
            f"damping must be larger than {damping}: the features that layer {name!r} reads "
            "depend on each other"
        ) from error


def _check_finite(meeting: Meeting) -> None:
    """Raise InputError unless a layer reads and gives finite numbers."""
    for what, x in (("input", meeting.inputs), ("output", meeting.outputs)):
        if not x.isfinite().all():
            raise InputError(
                f"the {what} of layer {meeting.name!r} is not finite: does the pipeline give "
                "proper images in this dtype?"
            )


def refine(
    denoiser: DiffusionPipeline | nn.Module,
    trajectories: Trajectories,
    config: RefinementConfig,
    *,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Round the weights of a quantized denoiser anew and correct them, without training.

    The layers are met in the order in which they run, each with the inputs that it gets from the
    layers already refined and the outputs that it has in full precision. `quantize` does this
    where its config has a `RefinementConfig`.

    Args:
        denoiser: Quantized by `quantize` to the nearest values, open, or a pipeline with one;
            changed in place. Its weights become values of their grids, and stay open to `finetune`.
        trajectories: Recorded from the full-precision denoiser. Samples are drawn from all
            timesteps alike.
        config: What is corrected and how.
        progress: Called with each layer's name once it is refined.

    Raises:
        InputError: If the denoiser has no quantized layer, one that is sealed or has LoRAs, or
            branches already where it is to get some, or numbers are not finite.
    """
    denoiser = denoiser_of(denoiser)
    check_type("trajectories", trajectories, Trajectories)
    check_type("config", config, RefinementConfig)
    untrained_layers(denoiser)
    samples = config.samples or _samples(trajectories)
    if config.branch_rank:
        add_branches(denoiser, config.branch_rank)
    if config.split_inputs:
        split_inputs(denoiser, trajectories, samples=samples, seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    steps, rows = trajectories.samples.shape[:2]
    step, row = spread_batch(steps, rows, samples, generator)
    biased = _biased(denoiser, trajectories, config)
    meet_layers(denoiser, trajectories, step, row, _Refiner(config, biased, progress))
    attach_anew(denoiser, refine=config)


def _samples(trajectories: Trajectories) -> int:
    """Return as many samples as moments want, or fewer where these are large."""
    numbers = trajectories.samples[0, 0].numel()
    return max(FEWEST_SAMPLES, min(MOST_SAMPLES, MOST_NUMBERS // numbers))


def _biased(denoiser: nn.Module, trajectories: Trajectories, config: RefinementConfig) -> set[str]:
    """Return the names of the layers whose bias is to be corrected."""
    if config.correct_bias == "none":
        return set()
    if config.correct_bias == "all":
        return set(untrained_layers(denoiser))
    met: list[str] = []
    first = torch.zeros(1, dtype=torch.int64)
    meet_layers(denoiser, trajectories, first, first, lambda meeting: met.append(meeting.name))
    return set(met[-1:])
