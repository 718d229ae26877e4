"""Dividing a budget among layers: bits of weights and ranks of low-rank branches.

Each layer has options of a size and an error (`sensitivity`). Those on the lower convex hull of a
layer are its steps. The step with the largest gain for its size is taken first, until the budget is
used up. A layer ends at the first of its steps that does not fit.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from diffusers import DiffusionPipeline
from torch import nn

from msfp.config import MAX_BITS, LayerSettings, QuantizationConfig, RefinementConfig
from msfp.errors import InputError
from msfp.layers.adapters import merged_adapters
from msfp.layers.base import refuse_quantized
from msfp.layers.kinds import PlainLayer
from msfp.layers.selection import quantizable_layers
from msfp.pipelines.denoiser import denoiser_of, denoisers_of
from msfp.pipelines.trajectories import Trajectories
from msfp.ptq.low_rank_branches import is_smaller
from msfp.ptq.request import refinement_of, settings_of
from msfp.ptq.sensitivity import WIDTHS, Sensitivity, measure_sensitivities
from msfp.ptq.state import QuantizationState, state_of
from msfp.ptq.stored_size import layer_bytes
from msfp.search.calibration import Calibration
from msfp.support.checks import check_type
from msfp.support.decibels import sqnr
from msfp.support.globs import matches
from msfp.support.offloading import is_moved, with_weights
from msfp.support.progress import Progress, shown_progress
from msfp.support.sizes import parse_size

LEFT = {"gptq": 0.5, "nearest": 1.0}
"""The part of the rounding error of weights that each method of rounding leaves."""


class Option(NamedTuple):
    """One way to quantize the weight of a layer.

    Attributes:
        size: Bytes in the file.
        error: What it costs in the squared error of a sample's prediction.
        bits: Bits of the weights.
        rank: Rank of the low-rank branch.
    """

    size: int
    error: float
    bits: int
    rank: int


@dataclass(frozen=True)
class Allocation:
    """How a budget is divided among layers.

    Attributes:
        chosen: The bits of the weights, and the rank of the branch, of each layer that had a
            choice.
        bits_per_weight: Bits of all quantized layers in the file, over the number of their weights.
        predicted_sqnr: The SQNR of the prediction in dB that is expected of it.
        curve: Other pairs of bits for each weight and SQNR: what each bit buys, from the smallest
            choice to the largest.
        weights: Number of weights in layers with a choice, by their bits and rank.
    """

    chosen: Mapping[str, tuple[int, int]]
    bits_per_weight: float
    predicted_sqnr: float
    curve: Sequence[tuple[float, float]]
    weights: Mapping[tuple[int, int], int]

    def apply(self, config: QuantizationConfig) -> QuantizationConfig:
        """Return a config with the choice of each layer among its overrides.

        Example:
            >>> found = Allocation({"conv": (6, 8)}, 4.5, 20.0, [], {})
            >>> found.apply(QuantizationConfig(budget=4.5)).overrides
            {'conv': {'weight_bits': 6, 'branch_rank': 8}}
        """
        chosen = {
            name: {**config.overrides.get(name, {}), "weight_bits": bits, "branch_rank": rank}
            for name, (bits, rank) in self.chosen.items()
        }
        return replace(config, overrides={**config.overrides, **chosen})

    def settings(self, settings: Mapping[str, LayerSettings]) -> dict[str, LayerSettings]:
        """Return the settings of layers with the choice of each."""
        chosen = {
            name: settings[name]._replace(weight_bits=bits, branch_rank=rank)
            for name, (bits, rank) in self.chosen.items()
        }
        return {**settings, **chosen}


class _Budget:
    """The options of each layer, and what is spent.

    Args:
        options: The steps of each layer with a choice, from its smallest.
        weights: Number of weights of all quantized layers.
        fixed: Bytes of the quantized layers without a choice.
    """

    def __init__(self, options: Mapping[str, list[Option]], weights: int, fixed: int) -> None:
        self.options, self.weights = options, weights
        self.at = dict.fromkeys(options, 0)
        self.size = fixed + sum(each[0].size for each in options.values())
        self.error = sum(each[0].error for each in options.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of the quantized layers, over the number of their weights."""
        return 8 * self.size / self.weights

    def spend(self, size: float, note: Callable[[], object]) -> None:
        """Take the steps with the largest gains, up to a size in bytes; call `note` after each."""
        steps = sorted(
            ((before.error - after.error) / (after.size - before.size), name, number)
            for name, options in self.options.items()
            for number, (before, after) in enumerate(pairwise(options), 1)
        )
        ended: set[str] = set()
        for _, name, number in reversed(steps):
            before, after = self.options[name][number - 1 : number + 1]
            if name in ended or self.size + after.size - before.size > size:
                ended.add(name)
                continue
            self.at[name] = number
            self.size += after.size - before.size
            self.error += after.error - before.error
            note()

    @property
    def chosen(self) -> dict[str, Option]:
        """The option of each layer."""
        return {name: self.options[name][at] for name, at in self.at.items()}


@with_weights(denoisers_of)
def allocate_bits(
    model: DiffusionPipeline | nn.Module,
    config: QuantizationConfig,
    *,
    calibration: Calibration | None = None,
    trajectories: Trajectories,
    state: str | Path | None = None,
    progress: Progress = shown_progress,
) -> Allocation:
    """Return how the budget of a config is divided among the layers of a denoiser.

    `quantize` does the same with the budget of its config. This function shows the result, which
    may be changed: `Allocation.apply` makes a config of it.

    Args:
        model: A pipeline with one denoiser, or the denoiser, in full precision. It is not changed.
        config: As for `quantize`, with a budget.
        calibration: What `calibrate` returned for the same denoiser. Not needed if inputs are not
            quantized.
        trajectories: What `record_trajectories` returned for the same denoiser.
        state: A folder that keeps what is measured, as for `quantize`.
        progress: Called as the measurement advances.

    Raises:
        InputError: If the config has no budget, the budget is too small, no gradient can be
            computed, or as `quantize` does.

    Example:
        >>> import torch, msfp
        >>> network = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)).eval()
        >>> noise = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        >>> calls = [lambda network: network(noise)]
        >>> found = allocate_bits(
        ...     network,
        ...     QuantizationConfig(budget=6, end_bits=4),
        ...     calibration=msfp.calibrate(network, calls=calls),
        ...     trajectories=msfp.record_trajectories(network, calls=calls),
        ... )
        >>> sorted(found.chosen), 5 < found.bits_per_weight <= 6
        (['0', '2'], True)
    """
    check_type("config", config, QuantizationConfig)
    check_type("trajectories", trajectories, Trajectories)
    if calibration is not None:
        check_type("calibration", calibration, Calibration)
    if config.budget is None:
        raise InputError("config must have a budget, such as QuantizationConfig(budget=4.5)")
    denoiser = denoiser_of(model)
    refuse_quantized("the denoiser", denoiser)
    with merged_adapters(denoiser):
        settings = settings_of(denoiser, config, calibration)
        refinement = refinement_of(denoiser, config, settings, recordable=True)
        kept = None
        if state is not None:
            kept = state_of(state, denoiser, config).of_data(calibration, trajectories)
        return allocate(
            denoiser, config, settings, refinement, calibration, trajectories, kept, progress
        )


def allocate(
    denoiser: nn.Module,
    config: QuantizationConfig,
    settings: Mapping[str, LayerSettings],
    refinement: RefinementConfig | None,
    calibration: Calibration | None,
    trajectories: Trajectories,
    state: QuantizationState | None,
    progress: Progress,
) -> Allocation:
    """Return how the budget of a config is divided among the layers of a denoiser.

    Args:
        denoiser: In full precision.
        config: With a budget.
        settings: The settings of each layer that is quantized.
        refinement: How weights will be refined; or None.
        calibration: Histograms of the inputs; not needed if inputs are not quantized.
        trajectories: Of the full-precision denoiser.
        state: Keeps what is measured; or None.
        progress: Called as the measurement advances.

    Raises:
        InputError: If the budget is too small, or no gradient can be computed.
    """
    layers, weights = _selected(denoiser, settings)
    rank = 0 if refinement is None else refinement.branch_rank
    check_budget(denoiser, config, settings, rank)
    free = [name for name, each in settings.items() if is_free(name, each, config)]
    found = measure_sensitivities(
        denoiser, {name: layers[name] for name in free}, settings, calibration, trajectories,
        seed=0 if refinement is None else refinement.seed, state=state, progress=progress,
    )  # fmt: skip
    left = LEFT["nearest" if refinement is None else refinement.rounding]
    options = {
        name: hull(_options(layers[name], each, left, branches=bool(rank)))
        for name, each in found.items()
    }
    options |= {name: [_smallest(layers[name])] for name in free if name not in found}
    _warn_of([name for name in free if name not in found])
    fixed = _bytes(layers, {n: each for n, each in settings.items() if n not in free}, rank)
    predicted = trajectories.of_sample(trajectories.predictions.flatten(0, 1)).double()
    power = float(predicted.square().sum()) / len(predicted)
    size = budget_bytes(config.budget, denoiser, layers)
    return _divided(options, layers, weights, fixed, size, power)


def _smallest(layer: PlainLayer) -> Option:
    """Return the smallest option of a layer, whose error is unknown."""
    return Option(layer_bytes(layer, WIDTHS[0], 0), 0.0, WIDTHS[0], 0)


def _warn_of(unseen: Sequence[str]) -> None:
    """Warn of layers that no sample measures."""
    if unseen:
        warnings.warn(
            f"{len(unseen)} layers get {WIDTHS[0]} bits, because no gradient of a sample reaches "
            f"them: give them weight_bits in overrides: {', '.join(unseen[:5])}",
            stacklevel=3,
        )


def _selected(
    denoiser: nn.Module, settings: Mapping[str, LayerSettings]
) -> tuple[dict[str, PlainLayer], int]:
    """Return the layers that are quantized, and the number of their weights."""
    plain = quantizable_layers(denoiser)
    layers = {name: plain[name] for name in settings}
    return layers, sum(layer.weight.numel() for layer in layers.values())


def _bytes(
    layers: Mapping[str, PlainLayer], settings: Mapping[str, LayerSettings], rank: int
) -> int:
    """Return the bytes of layers with their own settings."""
    return sum(
        layer_bytes(layers[name], each.weight_bits, rank_of(layers[name], each, rank))
        for name, each in settings.items()
    )


def _divided(
    options: Mapping[str, list[Option]],
    layers: Mapping[str, PlainLayer],
    weights: int,
    fixed: int,
    size: float,
    power: float,
) -> Allocation:
    """Return the allocation of a size in bytes; `power` is that of a sample's prediction."""
    whole = _Budget(options, weights, fixed)
    curve = [(whole.bits_per_weight, sqnr(power, whole.error))]
    whole.spend(
        float("inf"), lambda: curve.append((whole.bits_per_weight, sqnr(power, whole.error)))
    )
    budget = _Budget(options, weights, fixed)
    budget.spend(size, lambda: None)
    counts: Counter[tuple[int, int]] = Counter()
    for name, each in budget.chosen.items():
        counts[each.bits, each.rank] += layers[name].weight.numel()
    return Allocation(
        {name: (each.bits, each.rank) for name, each in budget.chosen.items()},
        budget.bits_per_weight,
        sqnr(power, budget.error),
        curve,
        dict(counts),
    )


def is_free(name: str, settings: LayerSettings, config: QuantizationConfig) -> bool:
    """Return whether a budget chooses the bits of a layer: those of others are given."""
    given = any(
        matches(name, glob) and not {"weight_bits", "branch_rank"}.isdisjoint(changes)
        for glob, changes in config.overrides.items()
    )
    return not given and settings.weight_bits == config.weight_bits


def rank_of(layer: PlainLayer, settings: LayerSettings, usual: int) -> int:
    """Return the rank of the branch beside a layer, 0 for none; `usual` is where none is set."""
    rank = usual if settings.branch_rank is None else settings.branch_rank
    narrow = settings.weight_bits < MAX_BITS
    return rank if rank and narrow and is_smaller(layer.weight, rank) else 0


def _options(layer: PlainLayer, found: Sensitivity, left: float, *, branches: bool) -> list[Option]:
    """Return all options of a layer."""
    ranks = [
        rank
        for rank in found.by_weight
        if not rank or (branches and is_smaller(layer.weight, rank))
    ]
    return [
        Option(layer_bytes(layer, bits, rank), found.error(bits, rank, share=left), bits, rank)
        for bits in WIDTHS
        for rank in ranks
        if bits < MAX_BITS or not rank
    ]


def hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of error over size, from the smallest.

    Example:
        >>> every = [Option(1, 9.0, 3, 0), Option(2, 8.0, 4, 0), Option(3, 1.0, 3, 8)]
        >>> [each.rank for each in hull(every)]
        [0, 8]
    """
    kept: list[Option] = []
    for each in sorted(options):
        if kept and each.error >= kept[-1].error:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], each):
            kept.pop()
        kept.append(each)
    return kept


def _slope(before: Option, after: Option) -> float:
    """Return the change of the error for each byte, which is negative."""
    return (after.error - before.error) / max(1, after.size - before.size)


def budget_bytes(
    budget: float | str | None, denoiser: nn.Module, layers: Mapping[str, PlainLayer]
) -> float:
    """Return the bytes that the quantized layers may have."""
    if isinstance(budget, str):
        whole: int = sum(each.nbytes for each in denoiser.state_dict().values())
        quantized: int = sum(layer.weight.nbytes for layer in layers.values())
        return parse_size("budget", budget) - (whole - quantized)
    weights = sum(layer.weight.numel() for layer in layers.values())
    return float(budget or 0) * weights / 8


def check_budget(
    denoiser: nn.Module,
    config: QuantizationConfig,
    settings: Mapping[str, LayerSettings],
    rank: int,
) -> None:
    """Raise InputError if a budget is too small, or no gradient can be computed.

    The smallest budget is that of the smallest choice of each layer. Where weights are on another
    device than the one that computes, they are not there in the backward pass.

    Args:
        denoiser: In full precision.
        config: With a budget.
        settings: The settings of each layer that is quantized.
        rank: Of the branches beside layers whose settings have none; 0 for no branch.
    """
    if is_moved(denoiser) and any(is_free(n, each, config) for n, each in settings.items()):
        raise InputError(
            "budget needs the weights on the device that computes: remove the offloading, or "
            "call msfp.allocate_bits before it is enabled and quantize with what its apply returns"
        )
    layers, weights = _selected(denoiser, settings)
    smallest = {
        name: each._replace(weight_bits=WIDTHS[0], branch_rank=0)
        if is_free(name, each, config) else each
        for name, each in settings.items()
    }  # fmt: skip
    least, budget = _bytes(layers, smallest, rank), config.budget
    size = budget_bytes(budget, denoiser, layers)
    if least <= size:
        return
    needed = f"{math.ceil(800 * least / weights) / 100} bits for each weight"
    if isinstance(budget, str):
        more = parse_size("budget", budget) + least - size
        needed = f"{math.ceil(more / 1e4) / 100} MB"
    raise InputError(f"budget must be at least {needed} for this denoiser, not {budget!r}")
