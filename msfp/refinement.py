"""Correcting the weights and biases of a quantized denoiser, layer after layer, in one forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fpformats import quantize_scaled
from msfp.adaround import adaround
from msfp.config import RefinementConfig
from msfp.correction import matched_bias, matched_matrix
from msfp.denoiser import position
from msfp.fine_tuning import draw_batch
from msfp.gptq import damped, gptq, upper_factor
from msfp.layers import QuantizedLayer
from msfp.low_rank import LowRankBranch, branches_of
from msfp.moments import as_matrix, layer_moments
from msfp.paired import Meeting, paired
from msfp.post_training import float_formats
from msfp.quantizer import Quantizer
from msfp.sampling import Trajectories
from msfp.split import split_inputs
from msfp.weight_search import search_scales


class _Refiner:
    """Refines each layer that it meets."""

    def __init__(
        self,
        config: RefinementConfig,
        branches: dict[str, LowRankBranch],
        progress: Callable[[str], None] | None,
    ) -> None:
        self.config, self.branches, self.progress = config, branches, progress
        self.generator = torch.Generator().manual_seed(config.seed)

    def __call__(self, meeting: Meeting) -> None:
        layer, config = meeting.layer, self.config
        moments = layer_moments(
            layer,
            layer.input_quantizer(meeting.inputs),
            self._wanted(meeting),
            most=config.positions,
            generator=self.generator,
        )
        matrix = as_matrix(layer, layer.weight)
        corrected = config.correct_bias == "all" or (
            config.correct_bias == "last" and position(meeting.name) == "last"
        )
        centred = corrected and layer.bias is not None
        second = damped(moments.second(centred=centred), config.damping)
        upper = upper_factor(second)
        if config.match_inputs:
            matrix = matched_matrix(matrix, moments, upper, centred=centred)
        if config.scales != "weight":
            self._search(matrix, second, layer)
        matrix = self._rounded(matrix, second, upper, layer)
        layer.weight = nn.Parameter(matrix.reshape(layer.weight.shape), requires_grad=False)
        if centred:
            layer.bias = nn.Parameter(matched_bias(matrix, moments), requires_grad=False)
        if self.progress is not None:
            self.progress(meeting.name)

    def _wanted(self, meeting: Meeting) -> torch.Tensor:
        """Return what the quantized layer should give, its branch making up for its own errors."""
        branch = self.branches.get(meeting.name)
        if branch is None:
            return meeting.outputs
        change: torch.Tensor = branch(meeting.layer, meeting.full_inputs) - branch(
            meeting.layer, meeting.inputs
        )
        return meeting.outputs + change

    def _search(self, matrix: torch.Tensor, second: torch.Tensor, layer: QuantizedLayer) -> None:
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
        self,
        matrix: torch.Tensor,
        second: torch.Tensor,
        upper: torch.Tensor,
        layer: QuantizedLayer,
    ) -> torch.Tensor:
        fmt = layer.weight_quantizer.format
        scale = layer.weight_quantizer.scale.view(*matrix.shape[:2], 1)
        if self.config.rounding == "gptq":
            return gptq(matrix, second, fmt, scale, sweeps=self.config.sweeps, upper=upper)
        if self.config.rounding == "adaround":
            return adaround(matrix, second, fmt, scale)
        rounded: torch.Tensor = quantize_scaled(matrix.contiguous(), fmt, scale)
        return rounded


@torch.no_grad()
def refine(
    denoiser: nn.Module,
    trajectories: Trajectories,
    config: RefinementConfig,
    *,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Round the weights of a quantized denoiser anew and correct them, without training.

    The layers are met in the order in which they run, each with the inputs that it gets from the
    layers already refined and the outputs that it has in full precision.

    Args:
        denoiser: Quantized by `quantize`, open; changed in place. Its weights become values of
            their grids, and stay open to `finetune`.
        trajectories: Recorded from the full-precision denoiser. Samples are drawn from all
            timesteps alike.
        config: What is corrected and how.
        progress: Called with each layer's name once it is refined.

    Raises:
        InputError: If the denoiser has no quantized layer, or one that is sealed or has LoRAs.
    """
    if config.split_inputs:
        split_inputs(denoiser, trajectories, samples=config.samples, seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    steps, count = trajectories.samples.shape[:2]
    step, trajectory = draw_batch(steps, count, config.samples, generator)
    sample, timestep = trajectories.samples[step, trajectory], trajectories.timesteps[step]
    with paired(denoiser, _Refiner(config, branches_of(denoiser), progress)):
        denoiser(torch.cat([sample, sample]), torch.cat([timestep, timestep]))
