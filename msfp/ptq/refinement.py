"""Correcting a quantized denoiser's weights and biases layer by layer, in one forward pass."""

from __future__ import annotations

import warnings

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.config import RefinementConfig
from msfp.errors import InputError
from msfp.layers.trainable import TrainableLayer, untrained_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories, WholeForwards, as_whole, spread_batch
from msfp.ptq.concatenations import split_inputs
from msfp.ptq.low_rank_branches import add_branches
from msfp.ptq.moments import as_matrix, layer_moments, matched_bias, matched_matrix
from msfp.ptq.rounding.gptq import damped, upper_factor
from msfp.ptq.rounding.methods import ROUNDINGS
from msfp.ptq.side_by_side import Visit, halves_are_mixed, visit_layers
from msfp.support.checks import check_type
from msfp.support.progress import Progress, counted, no_progress

FEWEST_SAMPLES, MOST_SAMPLES, MOST_NUMBERS = 64, 256, 2**20
"""Bounds of the default number of samples in one forward pass, and the most numbers in all."""
MOST_DAMPING = 1e6
"""Damping with which second moments are a multiple of the unit matrix, up to rounding."""


class _Refiner:
    """Refines each layer that it visits, in float32 for every dtype of the denoiser.

    Args:
        config: What is corrected and how.
        biased: Names of the layers whose bias is corrected.
        layers: Number of layers to refine.
        progress: Called after each layer.

    Attributes:
        refined: Names of the layers refined so far.
        damped: Damping of the layers that needed more than the config's.
    """

    def __init__(
        self, config: RefinementConfig, biased: set[str], layers: int, progress: Progress
    ) -> None:
        self.config, self.biased = config, biased
        self.refined: set[str] = set()
        self.damped: dict[str, float] = {}
        self.done = counted(progress, "refining", layers)
        self.generator = torch.Generator().manual_seed(config.seed)

    def __call__(self, visit: Visit) -> None:
        layer, config = visit.layer, self.config
        _check_finite(visit)
        # The low-rank branch reads the input before rounding. The matrix must give the rest of the
        # output, and so corrects the errors of the branch too.
        wanted = -layer.add_branch(visit.inputs, -visit.outputs)
        moments = layer_moments(
            layer,
            layer.quantize_input(visit.inputs).float(),
            wanted.float(),
            most=config.positions,
            generator=self.generator,
        )
        matrix = as_matrix(layer, layer.weight.float())
        centred = visit.name in self.biased and layer.bias is not None
        second, upper, damping = _damped_factor(moments.second(centred=centred), config.damping)
        if damping > config.damping:
            self.damped[visit.name] = damping
        if config.match_inputs:
            matrix = matched_matrix(matrix, moments, upper, centred=centred)
        matrix = self._rounded(matrix, second, upper, layer)
        layer.weight = _parameter(matrix, layer.weight)
        if centred:
            layer.bias = _parameter(matched_bias(matrix, moments), layer.bias)
        self.refined.add(visit.name)
        self.done(1)

    def _rounded(
        self, matrix: torch.Tensor, second: torch.Tensor, upper: torch.Tensor, layer: TrainableLayer
    ) -> torch.Tensor:
        fmt = layer.weight_quantizer.format
        scale = layer.weight_quantizer.scale.view(*matrix.shape[:2], 1)
        return ROUNDINGS[self.config.rounding](matrix, second, fmt, scale, upper=upper)


def _parameter(values: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """Return values as a parameter with the shape and dtype of another."""
    return nn.Parameter(values.reshape(like.shape).to(like.dtype), requires_grad=False)


def _damped_factor(
    second: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return damped second moments, their upper factor, and the damping.

    Where features depend on each other, rounding errors need a larger damping than the given one.
    """
    while True:
        moments = damped(second, damping)
        try:
            return moments, upper_factor(moments), damping
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if damping > MOST_DAMPING:
                raise
            damping *= 10


def _check_finite(visit: Visit) -> None:
    """Raise InputError unless the inputs and outputs of a layer are finite."""
    for what, x in (("input", visit.inputs), ("output", visit.outputs)):
        if not x.isfinite().all():
            raise InputError(
                f"the {what} of layer {visit.name!r} is not finite: check that the pipeline "
                "generates correct images in this dtype"
            )


def refine(
    model: DiffusionPipeline | nn.Module,
    config: RefinementConfig | None = None,
    *,
    trajectories: Trajectories,
    progress: Progress = no_progress,
) -> list[str]:
    """Round the weights of a quantized denoiser again and correct them, in place, without training.

    The layers are visited in the order in which they run. Each is fitted to its full-precision
    outputs, with the inputs that it gets from the layers already refined. `quantize` does this if
    its config has a `RefinementConfig`.

    Args:
        model: A pipeline or its denoiser, quantized by `quantize` to the nearest values, and
            trainable. Its weights become values of their grids; `finetune` can still train them.
        config: What is corrected and how; None for the defaults.
        trajectories: Recorded from the full-precision denoiser. Samples are drawn evenly from all
            timesteps.
        progress: Called after each layer.

    Returns:
        The names of the refined layers: those whose input depends on the samples.

    Raises:
        InputError: If the denoiser has no quantized layer, has one that is packed or has LoRAs, or
            has low-rank branches already although the config adds some, or numbers are not finite.

    Warns:
        UserWarning: If the damping of a layer was raised, or layers were not refined.
    """
    denoiser = denoiser_of(model)
    config = RefinementConfig() if config is None else config
    check_type("config", config, RefinementConfig)
    check_type("trajectories", trajectories, Trajectories)
    layers = untrained_layers(denoiser)
    samples = config.samples or _samples(trajectories)
    if not isinstance(trajectories, WholeForwards) and halves_are_mixed(denoiser, trajectories):
        trajectories = as_whole(trajectories)
    if config.branch_rank:
        add_branches(denoiser, config.branch_rank)
    if config.split_inputs:
        split_inputs(denoiser, trajectories=trajectories, samples=samples, seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    steps, rows = trajectories.samples.shape[:2]
    step, row = spread_batch(steps, rows, samples, generator)
    biased = _biased(denoiser, trajectories, config)
    refiner = _Refiner(config, biased, len(layers), progress)
    visit_layers(denoiser, trajectories, step, row, refiner)
    idle = [name for name in layers if name not in refiner.refined]
    if idle:
        refiner.done(len(idle))
        warnings.warn(
            f"{len(idle)} layers are rounded to nearest and not refined, because they do not run "
            f"or their input does not depend on the samples: {', '.join(idle[:5])}",
            stacklevel=2,
        )
    _note_damping(refiner.damped, config.damping)
    attach_again(denoiser, refine=config)
    return [name for name in layers if name in refiner.refined]


def _note_damping(raised: dict[str, float], damping: float) -> None:
    """Warn of layers whose damping was raised."""
    if raised:
        name, most = max(raised.items(), key=lambda item: item[1])
        warnings.warn(
            f"{len(raised)} layers read features that depend on each other: their damping was "
            f"raised from {damping} to at most {most:g} ({name})",
            stacklevel=3,
        )


def _samples(trajectories: Trajectories) -> int:
    """Return the default number of samples, which is smaller for large samples."""
    numbers = max(1, trajectories.samples[0, 0].numel())
    return max(FEWEST_SAMPLES, min(MOST_SAMPLES, MOST_NUMBERS // numbers))


def _biased(denoiser: nn.Module, trajectories: Trajectories, config: RefinementConfig) -> set[str]:
    """Return the names of the layers whose bias is corrected."""
    if config.correct_bias == "none":
        return set()
    if config.correct_bias == "all":
        return set(untrained_layers(denoiser))
    visited: list[str] = []
    first = torch.zeros(1, dtype=torch.int64)
    visit_layers(denoiser, trajectories, first, first, lambda visit: visited.append(visit.name))
    return set(visited[-1:])
