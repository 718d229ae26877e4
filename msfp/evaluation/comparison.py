"""Comparing a quantized pipeline with the full-precision one, at equal seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats.fitting.histogram import Histogram
from msfp.checkpoint.io import packed_size
from msfp.errors import InputError
from msfp.evaluation.dataset_statistics import ReferenceStatistics
from msfp.evaluation.features import Features
from msfp.evaluation.fingerprint import KIND, comparison_facts
from msfp.evaluation.image_metrics import ImageMeasures, ReferenceDistances
from msfp.layers.base import quantized_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.sampler import Sampler
from msfp.pipelines.trajectories import Trajectories, record_trajectories
from msfp.search.layer_search import sqnr
from msfp.search.observers import calibrate
from msfp.support.autosave import TimedState
from msfp.support.progress import Advance, counted


@dataclass(frozen=True)
class Comparison:
    """What was measured; `to_dict` gives all but images and histograms.

    Attributes:
        sampler: The call of both pipelines.
        count: Images of each set.
        seed: Seed of the noise that both start from.
        psnr: Paired PSNR of the images in dB, all pixels of all images together.
        ssim: Mean structural similarity of the pairs, NaN where images are too small for it.
        sqnr: Energy of the full-precision images over that of the errors, in dB.
        frechet: Frechet distance of the quantized images from full-precision ones of other seeds,
            all of them rounded to 8 bits as image files are.
        frechet_floor: That of the full-precision images of equal seeds from the same: what is
            measured with nothing quantized.
        timesteps: The sampler's.
        noise_errors: Mean squared error of the prediction on full-precision trajectories, at each
            timestep.
        noise_sqnr: Energy of the prediction over that of the error, in dB, likewise.
        layers: SQNR in dB of the output of each quantized layer given full-precision inputs, over
            the same trajectories.
        trajectories: How many images these were of.
        reference: Distances from a data set, or None where its statistics were not given.
        bytes: Size of the tensors of the full-precision denoiser and of the quantized one.
        images: Some images of the full-precision pipeline and of the quantized one.
        inputs: What the layers of the full-precision denoiser read on these trajectories.
    """

    sampler: Sampler
    count: int
    seed: int
    psnr: float
    ssim: float
    sqnr: float
    frechet: float
    frechet_floor: float
    timesteps: list[float]
    noise_errors: list[float]
    noise_sqnr: list[float]
    layers: dict[str, float]
    trajectories: int
    reference: ReferenceDistances | None
    bytes: tuple[int, int]
    images: tuple[torch.Tensor, torch.Tensor]
    inputs: dict[str, Histogram]

    @property
    def noise_error(self) -> float:
        """Mean over timesteps."""
        return sum(self.noise_errors) / len(self.noise_errors)

    def table(self, features: str) -> list[tuple[str, str, str]]:
        """Return rows of a measure, its value and what it is of; `features` names the network."""
        pairs = f"{self.count} images of either model from equal noise"
        size, packed = (f"{number / 1e6:.2f}" for number in self.bytes)
        return [
            (
                "noise-prediction error",
                f"{self.noise_error:.4f}",
                f"{self.trajectories} full-precision trajectories of {len(self.timesteps)} steps",
            ),
            ("paired PSNR, dB", f"{self.psnr:.2f}", pairs),
            ("paired SSIM", f"{self.ssim:.4f}", pairs),
            ("paired SQNR, dB", f"{self.sqnr:.2f}", pairs),
            (
                f"Frechet distance ({features})",
                f"{self.frechet:.4g}",
                f"{self.count} images, from {self.count} full-precision ones of another seed",
            ),
            (
                "its noise floor",
                f"{self.frechet_floor:.4g}",
                "the same, with the full-precision images of equal seeds",
            ),
            *([] if self.reference is None else self.reference.table(self.count)),
            ("size, MB", packed, f"{size} in full precision"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON types, None where one is not finite."""
        left_out = ("sampler", "images", "inputs", "reference")
        values = {key: value for key, value in vars(self).items() if key not in left_out}
        if self.reference is not None:
            values["reference"] = asdict(self.reference)
        numbers: dict[str, Any] = _finite(
            {**asdict(self.sampler), **values, "noise_error": self.noise_error}
        )
        return numbers


def _finite(value: Any) -> Any:
    """Return plain JSON types with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def compare(
    full: DiffusionPipeline,
    quantized: DiffusionPipeline,
    sampler: Sampler,
    *,
    count: int,
    seed: int,
    features: Features,
    reference: ReferenceStatistics | None = None,
    state: Path | None = None,
    advance: Advance = lambda *_: None,
) -> Comparison:
    """Sample both pipelines from equal noise, and ask both denoisers the same.

    Images are compared batch by batch, so that their number is not limited by memory. On a CPU a
    comparison that goes on from its state has the bits of one that was never stopped.

    Args:
        full: The pipeline in full precision.
        quantized: The same, quantized.
        sampler: How to call them.
        count: Images of each set, at least two.
        seed: Seed of their noise; the next one is for the other full-precision images, and that
            after it for the trajectories.
        features: In which Frechet distances are measured.
        reference: Of a data set, in the same features; images of one channel count as RGB then.
        state: A safetensors file that is gone on from if it exists, and written anew each minute,
            or less often where that takes long; it is left for the caller to remove.
        advance: Told of the progress of each stage.

    Raises:
        InputError: If the second is not the first one quantized, a pipeline takes other
            conditions, the reference is of other features or of images of another size, or the
            state is of another comparison or cannot be written.
    """
    check_pair(denoiser_of(full), denoiser_of(quantized))
    sampler.arguments(full)
    if count < 2:
        raise InputError(f"count must be at least 2, not {count}")
    if reference is not None:
        reference.check_features(features)
    measures = ImageMeasures(features, reference)
    calls = [(quantized, seed), (full, seed), (full, seed + 1)]
    file = None
    if state is not None:
        file = TimedState(state, KIND, comparison_facts(calls, sampler, count, reference))
        file.restore(measures)
    progress = counted(advance, "images of both, and of another seed", count)
    progress(measures.count)
    batches = [sampler.batches(pipe, count, noise, measures.count) for pipe, noise in calls]
    for sets in zip(*batches, strict=True):
        measures.update(*sets)
        if file is not None and measures.count < count:
            file.save(measures)
        progress(len(sets[0]))
    paths, inputs = _observed(full, sampler, seed + 2)
    return Comparison(
        sampler=sampler,
        count=count,
        seed=seed,
        timesteps=paths.timesteps.tolist(),
        trajectories=sampler.batch,
        bytes=(packed_size(denoiser_of(full)), packed_size(denoiser_of(quantized))),
        inputs=inputs,
        **measures.found(),
        **_errors(denoiser_of(full), denoiser_of(quantized), paths, advance),
    )


def check_pair(full: nn.Module, quantized: nn.Module) -> None:
    """Raise InputError unless one denoiser is the other one quantized."""
    layers = quantized_layers(quantized)
    if quantized_layers(full) or not layers:
        raise InputError("a quantized pipeline must be compared with one in full precision")
    modules = dict(full.named_modules())
    for name, layer in layers.items():
        other = getattr(modules.get(name), "weight", None)
        if other is None or other.shape != layer.weight.shape:
            raise InputError(
                f"the pipelines are of different models: layer {name!r} is not the same in both"
            )


def _observed(
    pipe: DiffusionPipeline, sampler: Sampler, seed: int
) -> tuple[Trajectories, dict[str, Histogram]]:
    """Return the trajectories of one batch, and what the layers read on them."""
    recorded: list[Trajectories] = []

    def record(pipe: DiffusionPipeline) -> None:
        recorded.append(record_trajectories(pipe, sampler.calls(1, seed)))

    calibration = calibrate(pipe, record)
    return recorded[0], calibration.inputs


@torch.no_grad()
def _errors(
    full: nn.Module, quantized: nn.Module, paths: Trajectories, advance: Advance
) -> dict[str, Any]:
    """Return the errors of the predictions by timestep, and those of the layers' outputs."""
    progress = counted(advance, "errors by timestep and layer", len(paths.timesteps))
    rows = torch.arange(paths.samples.shape[1])
    errors: list[float] = []
    ratios: list[float] = []
    with _compared(full, quantized) as layers:
        for step, prediction in enumerate(paths.predictions):
            steps = torch.full_like(rows, step)
            # First the quantized one: its router's choice holds for the layers compared after it.
            difference = paths.predict(quantized, steps, rows).double() - prediction
            paths.predict(full, steps, rows)
            difference, prediction = paths.of_sample(difference), paths.of_sample(prediction)
            energy, noise = prediction.double().square().sum(), difference.square().sum()
            errors.append(noise.item() / difference.numel())
            ratios.append(sqnr(energy.item(), noise.item()))
            progress(1)
    return {"noise_errors": errors, "noise_sqnr": ratios, "layers": layers}


@contextmanager
def _compared(full: nn.Module, quantized: nn.Module) -> Iterator[dict[str, float]]:
    """Compare layers at each forward of the full one; the SQNR is there when the block ends."""
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
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found |= {name: sqnr(*sums) for name, sums in totals.items() if sums[0] > 0}
