"""Correcting a quantized denoiser's weights and biases layer by layer, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats.ops.block_formats import PRESETS
from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.config import MAX_BITS, RefinementConfig
from msfp.errors import InputError
from msfp.layers.block_quantizer import BlockQuantizer
from msfp.layers.trainable import TrainableLayer, untrained_layers
from msfp.layers.trainable_block import TrainableBlockLayer
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.ptq.channel_sizes import channel_sizes
from msfp.ptq.concatenations import split_inputs
from msfp.ptq.lockstep import Visit
from msfp.ptq.low_rank_branches import add_kept_branches
from msfp.ptq.moments import (
    Column,
    Moments,
    as_matrix,
    layer_moments,
    matched_bias,
    matched_matrix,
)
from msfp.ptq.rotation import rotate_inputs
from msfp.ptq.rounding.gptq import damp_, factor_of_flipped
from msfp.ptq.rounding.methods import ROUNDINGS
from msfp.ptq.rounding.weight_grid import WeightGrid
from msfp.ptq.side_by_side import check_forwards, probed_layers, visit_layers
from msfp.ptq.state import QuantizationState, on_device, quantizer_of, quantizer_state
from msfp.ptq.token_scales import SAMPLES, scale_tokens
from msfp.support.checks import check_type
from msfp.support.malloc import release_memory
from msfp.support.paging import PageFolder
from msfp.support.progress import Progress, counted, shown_progress

FEWEST_SAMPLES, MOST_SAMPLES, MOST_NUMBERS = 64, 256, 2**20
"""Bounds of the default number of samples in one forward pass, and the most numbers in all."""
REFINED = "refined"
"""Stage of the state."""
MOST_COLUMNS = 12288
"""Columns of a matrix whose second moments are in memory at once: 600 MB."""
MOST_DAMPING = 1e6
"""Damping with which second moments are a multiple of the unit matrix, up to rounding."""


class _Refiner:
    """Refines each layer that it visits, in float32 for every dtype of the denoiser.

    Args:
        config: What is corrected and how.
        biased: Names of the layers whose bias is corrected.
        layers: Number of layers to refine.
        progress: Called after each layer.
        state: Keeps each refined layer; or None.

    Attributes:
        refined: Names of the layers refined so far.
        damped: Damping of the layers that needed more than the config's.
    """

    def __init__(
        self,
        config: RefinementConfig,
        biased: set[str],
        layers: int,
        progress: Progress,
        state: QuantizationState | None,
    ) -> None:
        self.config, self.biased, self.state = config, biased, state
        self.refined: set[str] = set()
        self.damped: dict[str, float] = {}
        self.done = counted(progress, "refining", layers)
        self.generator = torch.Generator().manual_seed(config.seed)

    def __call__(self, visit: Visit) -> None:
        if not self._restore(visit):
            self._refine(visit)
            self._keep(visit)
        self.refined.add(visit.name)
        self.done(1)

    def _restore(self, visit: Visit) -> bool:
        """Set a layer to what was kept of it, if anything; return whether it was."""
        kept = None if self.state is None else self.state.load(REFINED, visit.name)
        if kept is None:
            return False
        (facts, tensors), layer = kept, visit.layer
        tensors = on_device(tensors, layer.weight)
        layer.weight = _parameter(tensors["weight"], layer.weight)
        if "quantizer" in facts:
            found = quantizer_of("quantizer", facts, tensors)
            layer.weight_quantizer = layer.weight_quantizer if found is None else found
        if "bias" in tensors and layer.bias is not None:
            layer.bias = _parameter(tensors["bias"], layer.bias)
        self.generator.set_state(tensors["generator"].cpu())
        if facts["damping"] is not None:
            self.damped[visit.name] = facts["damping"]
        return True

    def _keep(self, visit: Visit) -> None:
        """Keep a refined layer."""
        if self.state is None:
            return
        layer = visit.layer
        tensors = {"weight": layer.weight.detach(), "generator": self.generator.get_state()}
        if layer.bias is not None:
            tensors["bias"] = layer.bias.detach()
        facts: dict[str, Any] = {"damping": self.damped.get(visit.name)}
        if isinstance(layer.weight_quantizer, BlockQuantizer):
            found, scales = quantizer_state("quantizer", layer.weight_quantizer)
            facts, tensors = facts | found, tensors | scales
        self.state.save(REFINED, visit.name, facts, tensors)

    def _refine(self, visit: Visit) -> None:
        layer, config = visit.layer, self.config
        centred = visit.name in self.biased and layer.bias is not None
        matrix = as_matrix(layer, layer.weight.float())
        draws = self.generator.get_state()
        parts = _column_parts(matrix)
        for columns in parts:
            self.generator.set_state(draws)
            moments = layer_moments(
                layer,
                _targets(visit, centred=centred),
                visit.rows,
                select=_without_others(matrix, columns),
                most=config.positions,
                generator=self.generator,
            )
            means = moments.input_mean, moments.output_mean
            part = self._corrected(
                matrix[..., columns], moments, visit, columns, centred=centred, fit=len(parts) == 1
            )
            matrix = torch.cat(
                [matrix[..., : columns.start], part, matrix[..., columns.stop :]], dim=-1
            )
        layer.weight = _parameter(matrix, layer.weight)
        if centred:
            layer.bias = _parameter(matched_bias(part, *means), layer.bias)
        release_memory()

    def _corrected(
        self,
        matrix: torch.Tensor,
        moments: Moments,
        visit: Visit,
        columns: slice,
        *,
        centred: bool,
        fit: bool,
    ) -> torch.Tensor:
        """Return some columns of the matrix, corrected and rounded; the moments are used up.

        Scales of blocks are searched again if they are to `fit` the matched matrix.
        """
        layer, config = visit.layer, self.config
        residual = moments.residual(matrix, centred=centred) if config.match_inputs else None
        upper, damping = _damped_factor(moments, config.damping, centred=centred)
        if damping > config.damping:
            self.damped[visit.name] = max(damping, self.damped.get(visit.name, 0))
        if residual is not None:
            matrix = matched_matrix(matrix, residual, upper)
        old = layer.weight_quantizer
        if fit and isinstance(old, BlockQuantizer):
            layer.weight_quantizer = BlockQuantizer.of(old.name, matrix.view(layer.weight.shape))
        quantizer, shape = layer.weight_quantizer, layer.weight.shape
        scale = as_matrix(layer, quantizer.scales_of(shape))
        scale = scale[..., columns] if scale.shape[-1] > 1 else scale
        grid, chosen = WeightGrid(quantizer.format, scale), quantizer.chosen_of(shape)
        if chosen is not None:
            chosen = as_matrix(layer, chosen)[..., columns]
            grid = WeightGrid(quantizer.format, scale, quantizer.alternative, chosen)
        return ROUNDINGS[config.rounding](matrix, grid, upper=upper)


def _targets(visit: Visit, *, centred: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the quantized inputs of a layer, and what its matrix should make of them.

    The low-rank branch reads the input before rounding. The matrix must give the rest of the
    output, and so corrects the errors of the branch too. A bias that stays is not its task.
    """
    layer = visit.layer
    for inputs, outputs in visit.parts():
        _check_finite(visit.name, inputs, outputs)
        wanted = -layer.add_branch(inputs, -outputs)
        if layer.bias is not None and not centred:
            axis = layer.kind.channel_axis(wanted)
            wanted = wanted - layer.bias.view(-1, *(1,) * (wanted.dim() - 1 - axis))
        yield layer.quantize_input(layer.rotated(inputs)).float(), wanted.float()


def _column_parts(matrix: torch.Tensor) -> list[slice]:
    """Return the columns of a matrix in parts whose second moments fit the memory."""
    columns = matrix.shape[-1]
    size = -(-columns // -(-columns // MOST_COLUMNS))
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def _without_others(matrix: torch.Tensor, columns: slice) -> Column | None:
    """Return a function that leaves some columns, and what they have to give besides the others."""
    before, after = matrix[..., : columns.start], matrix[..., columns.stop :]
    if not before.shape[-1] + after.shape[-1]:
        return None

    def select(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others = before @ x[:, : columns.start] + after @ x[:, columns.stop :]
        return x[:, columns], y - others

    return select


def _parameter(values: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """Return values as a parameter with the shape and dtype of another."""
    return nn.Parameter(values.reshape(like.shape).to(like.dtype), requires_grad=False)


def _damped_factor(
    moments: Moments, damping: float, *, centred: bool
) -> tuple[torch.Tensor, float]:
    """Return the upper factor of the damped second moments, and the damping.

    Where features depend on each other, rounding errors need a larger damping than the given one.
    The moments are used up, since those of a wide layer fill much of the memory.
    """
    flipped = moments.take_second(centred=centred).flip(-2, -1)
    diagonal = flipped.diagonal(dim1=-2, dim2=-1).clone()
    while True:
        damp_(flipped, diagonal, damping)
        try:
            return factor_of_flipped(flipped), damping
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if damping > MOST_DAMPING:
                raise
            damping *= 10


def _check_finite(name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
    """Raise InputError unless the inputs and outputs of a layer are finite."""
    for what, x in (("input", inputs), ("output", outputs)):
        if not x.isfinite().all():
            raise InputError(
                f"the {what} of layer {name!r} is not finite: check that the pipeline "
                "generates correct images in this dtype"
            )


def refine(
    model: DiffusionPipeline | nn.Module,
    config: RefinementConfig | None = None,
    *,
    trajectories: Trajectories,
    progress: Progress = shown_progress,
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
    return refine_kept(denoiser, config, trajectories, None, None, progress)


def refine_kept(
    denoiser: nn.Module,
    config: RefinementConfig,
    trajectories: Trajectories,
    state: QuantizationState | None,
    pages: PageFolder | None,
    progress: Progress,
    ranks: Mapping[str, int] | None = None,
) -> list[str]:
    """Refine as `refine` does, and keep each layer in a state, from which a run resumes.

    Args:
        denoiser: As for `refine`, like `config`, `trajectories` and `progress`.
        config: What is corrected and how.
        trajectories: Of the full-precision denoiser.
        state: Keeps what is done; None keeps nothing.
        pages: Where samples wait between layers, and weights that are not needed now; None keeps
            them in memory.
        progress: Called after each layer.
        ranks: Ranks of the branches of layers that have another than the config's.
    """
    layers = untrained_layers(denoiser)
    check_forwards(denoiser, trajectories)
    if pages is not None:
        pages.drop_all(denoiser)
    samples = config.samples or default_samples(trajectories.samples[0, 0].numel())
    branches = dict.fromkeys(layers, config.branch_rank) | dict(ranks or {})
    if any(branches.values()):
        sizes = _sizes(denoiser, layers, branches, config, trajectories, min(samples, SAMPLES))
        added = add_kept_branches(
            denoiser, branches, config.branch_bits, state, pages, progress, sizes
        )
        without = [name for name, rank in (ranks or {}).items() if rank and name not in added]
        if without:
            warnings.warn(
                f"{len(without)} layers get no branch of the branch_rank that overrides give them, "
                "because they have 8 bits or it would be as large as the weight: "
                f"{', '.join(without[:5])}",
                stacklevel=2,
            )
    if config.split_inputs:
        split_inputs(
            denoiser, trajectories=trajectories, samples=samples, batch=config.batch,
            seed=config.seed,
        )  # fmt: skip
    if config.search_input_scales:
        for layer in layers.values():
            if isinstance(layer, TrainableBlockLayer) and layer.input_blocks is not None:
                layer.searches_inputs = PRESETS[layer.input_blocks].element.bits < MAX_BITS
    if config.token_scales:
        few = min(samples, SAMPLES)
        scale_tokens(
            denoiser, trajectories=trajectories, samples=few, batch=config.batch, seed=config.seed
        )
    if config.rotate_inputs:
        few = min(samples, SAMPLES)
        rotate_inputs(
            denoiser, trajectories=trajectories, samples=few, batch=config.batch,
            token_scales=config.token_scales, seed=config.seed,
        )  # fmt: skip
    if pages is not None:
        pages.drop_all(denoiser)
    generator = torch.Generator().manual_seed(config.seed)
    steps, rows = trajectories.samples.shape[:2]
    step, row = spread_batch(steps, rows, samples, generator)
    biased = _biased(denoiser, trajectories, config)
    refiner = _Refiner(config, biased, len(layers), progress, state)
    visit_layers(denoiser, trajectories, step, row, refiner, batch=config.batch, pages=pages)
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


def _sizes(
    denoiser: nn.Module,
    layers: Mapping[str, TrainableLayer],
    ranks: Mapping[str, int],
    config: RefinementConfig,
    trajectories: Trajectories,
    samples: int,
) -> dict[str, torch.Tensor]:
    """Return the sizes of the input channels by which branches weigh columns, if they do."""
    if config.branch_metric == "weight":
        return {}
    return channel_sizes(
        denoiser,
        {name: layer for name, layer in layers.items() if ranks[name]},
        trajectories,
        samples=samples,
        batch=config.batch,
        seed=config.seed,
    )


def _note_damping(raised: dict[str, float], damping: float) -> None:
    """Warn of layers whose damping was raised."""
    if raised:
        name, most = max(raised.items(), key=lambda item: item[1])
        warnings.warn(
            f"{len(raised)} layers read features that depend on each other: their damping was "
            f"raised from {damping} to at most {most:g} ({name})",
            stacklevel=3,
        )


def default_samples(numbers: int) -> int:
    """Return the default number of samples, which is smaller for samples of many numbers.

    Example:
        >>> default_samples(256), default_samples(4 * 64 * 64)
        (256, 64)
    """
    return max(FEWEST_SAMPLES, min(MOST_SAMPLES, MOST_NUMBERS // max(1, numbers)))


def _biased(denoiser: nn.Module, trajectories: Trajectories, config: RefinementConfig) -> set[str]:
    """Return the names of the layers whose bias is corrected."""
    if config.correct_bias == "none":
        return set()
    if config.correct_bias == "all":
        return set(untrained_layers(denoiser))
    ran, constant = probed_layers(denoiser, trajectories)
    return set([name for name in ran if name not in constant][-1:])
