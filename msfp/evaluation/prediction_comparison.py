"""Comparing the predictions of a quantized denoiser with those of the full-precision one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats import Histogram
from msfp.errors import InputError
from msfp.layers.base import quantized_layers, quantized_networks
from msfp.pipelines.denoiser import named, networks_of
from msfp.pipelines.recording import record_trajectories
from msfp.pipelines.sampler import Sampler
from msfp.pipelines.trajectories import Trajectories
from msfp.search.observers import calibrate
from msfp.support.decibels import sqnr
from msfp.support.hooks import hooked
from msfp.support.progress import Progress, counted, shown_progress

Pairs = dict[str, tuple[nn.Module, nn.Module]]
"""Full-precision and quantized networks by component."""
UNLIKE = "a quantized pipeline must be compared with one in full precision"


@dataclass(frozen=True)
class PredictionComparison:
    """The errors of one denoiser; the attributes are those of `Comparison`."""

    timesteps: list[float]
    noise_errors: list[float]
    noise_sqnr: list[float]
    layers: dict[str, float]
    inputs: dict[str, Histogram]

    def of_component(self, name: str, pairs: Pairs) -> PredictionComparison:
        """Return the same with the component in the names of layers, if there are several."""
        layers = {named(name, layer, pairs): ratio for layer, ratio in self.layers.items()}
        inputs = {named(name, layer, pairs): seen for layer, seen in self.inputs.items()}
        return replace(self, layers=layers, inputs=inputs)


def denoiser_pairs(original: DiffusionPipeline, model: DiffusionPipeline) -> Pairs:
    """Return the quantized networks of a pipeline, each with its original.

    Raises:
        InputError: If nothing is quantized, the original is quantized, or the pipelines are of
            different models.
    """
    plain, quantized = networks_of(original), quantized_networks(model)
    missing = [name for name in quantized if name not in plain]
    if missing:
        raise InputError(f"the pipelines are of different models: only one has a {missing[0]}")
    pairs = {name: (plain[name], network) for name, network in quantized.items()}
    if not pairs:
        raise InputError(UNLIKE)
    for pair in pairs.values():
        check_pair(*pair)
    return pairs


def check_pair(full: nn.Module, quantized: nn.Module) -> None:
    """Raise InputError unless the second denoiser is the first one, quantized."""
    layers = quantized_layers(quantized)
    if quantized_layers(full) or not layers:
        raise InputError(UNLIKE)
    modules = dict(full.named_modules())
    for name, layer in layers.items():
        other = getattr(modules.get(name), "weight", None)
        if other is None or other.shape != layer.weight.shape:
            raise InputError(
                f"the pipelines are of different models: layer {name!r} is not the same in both"
            )


def compare_predictions(
    original: DiffusionPipeline,
    pair: tuple[nn.Module, nn.Module],
    *,
    sampler: Sampler,
    seed: int,
    progress: Progress = shown_progress,
) -> PredictionComparison:
    """Compare the predictions of a pair of denoisers on full-precision trajectories.

    Args:
        original: The full-precision pipeline, with one denoiser.
        pair: That denoiser, and the same quantized.
        sampler: How to call the pipeline; one batch is recorded.
        seed: Seed of the noise.
        progress: Called after each timestep.
    """
    recorded: list[Trajectories] = []

    def record(pipe: DiffusionPipeline) -> None:
        recorded.append(record_trajectories(pipe, calls=sampler.calls(1, seed)))

    calibration = calibrate(original, calls=record)
    paths = recorded[0]
    errors, ratios, layers = _errors(*pair, paths, progress)
    return PredictionComparison(
        paths.timesteps.tolist(), errors, ratios, layers, calibration.inputs
    )


@torch.no_grad()
def _errors(
    full: nn.Module, quantized: nn.Module, paths: Trajectories, progress: Progress
) -> tuple[list[float], list[float], dict[str, float]]:
    """Return the errors of the predictions by timestep, and those of the layers' outputs."""
    done = counted(progress, "errors by timestep and layer", len(paths.timesteps))
    rows = torch.arange(paths.samples.shape[1])
    errors: list[float] = []
    ratios: list[float] = []
    with _compared(full, quantized) as layers:
        for step, prediction in enumerate(paths.predictions):
            steps = torch.full_like(rows, step)
            # The quantized denoiser runs first: the layers compared next use its router's choice.
            difference = paths.predict(quantized, steps, rows).double() - prediction
            paths.predict(full, steps, rows)
            difference, prediction = paths.of_sample(difference), paths.of_sample(prediction)
            energy, noise = prediction.double().square().sum(), difference.square().sum()
            errors.append(noise.item() / difference.numel())
            ratios.append(sqnr(energy.item(), noise.item()))
            done(1)
    return errors, ratios, layers


@contextmanager
def _compared(full: nn.Module, quantized: nn.Module) -> Iterator[dict[str, float]]:
    """Compare layers at each full-precision forward pass; fill in the SQNR when the block ends."""
    layers = quantized_layers(quantized)
    totals = {name: [0.0, 0.0] for name in layers}

    def hook(name: str, layer: nn.Module) -> Callable[..., None]:
        def observe(_: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
            noise = layer(args[0] if args else kwargs["input"]) - output
            for index, x in enumerate((output, noise)):
                totals[name][index] += x.double().square().sum().item()

        return observe

    handles = [
        full.get_submodule(name).register_forward_hook(hook(name, layer), with_kwargs=True)
        for name, layer in layers.items()
    ]
    found: dict[str, float] = {}
    with hooked(handles):
        yield found
    found |= {name: sqnr(*sums) for name, sums in totals.items() if sums[0] > 0}
