"""Comparing a quantized pipeline with the full-precision one, at equal seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fpformats import Histogram
from msfp.checkpoint.io import packed_size
from msfp.evaluation.dataset_statistics import DatasetStatistics
from msfp.evaluation.features import Features, feature_network
from msfp.evaluation.fingerprint import STATE, comparison_fingerprint
from msfp.evaluation.image_metrics import ImageMetrics
from msfp.evaluation.metrics import ImageSets, Measure, Setting
from msfp.evaluation.prediction_comparison import compare_predictions, denoiser_pairs
from msfp.pipelines.denoiser import select_denoisers
from msfp.pipelines.sampler import Sampler
from msfp.support.autosave import Autosave
from msfp.support.checks import MAX_SEED, check_callable, check_path, check_type, check_whole
from msfp.support.progress import Progress, counted, of_part, shown_progress


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison; `to_dict` returns all except images and histograms.

    Attributes:
        sampler: The call of both pipelines.
        count: Number of images in each set.
        seed: Seed of the noise that both pipelines start from.
        measures: The results of the image metrics, in the order of tables.
        timesteps: The timesteps of the sampler; those of several denoisers follow each other.
        noise_errors: Mean squared error of the prediction on full-precision trajectories, at each
            timestep.
        noise_sqnr: Energy of the prediction over that of its error on these trajectories, in dB, at
            each timestep.
        layers: SQNR in dB of the output of each quantized layer with full-precision inputs, over
            the same trajectories.
        trajectories: Number of images on these trajectories.
        bytes: Size of the tensors of the full-precision denoisers and of the quantized ones.
        images: Some images of the full-precision pipeline and of the quantized one.
        inputs: Histograms of the layers' inputs in the full-precision denoiser on these
            trajectories.
    """

    sampler: Sampler
    count: int
    seed: int
    measures: list[Measure]
    timesteps: list[float]
    noise_errors: list[float]
    noise_sqnr: list[float]
    layers: dict[str, float]
    trajectories: int
    bytes: tuple[int, int]
    images: tuple[torch.Tensor, torch.Tensor]
    inputs: dict[str, Histogram]

    @property
    def noise_error(self) -> float:
        """Mean of `noise_errors` over timesteps."""
        return sum(self.noise_errors) / len(self.noise_errors)

    @property
    def values(self) -> dict[str, float]:
        """The measures by their keys, such as "psnr"."""
        return {measure.key: measure.value for measure in self.measures}

    def table(self) -> list[tuple[str, str, str]]:
        """Return one row for each measure: its label, its value, and the data measured on."""
        size, packed = (f"{number / 1e6:.2f}" for number in self.bytes)
        steps = f"{self.trajectories} full-precision trajectories of {len(self.timesteps)} steps"
        return [
            ("noise-prediction error", f"{self.noise_error:.4f}", steps),
            *((measure.label, measure.text, measure.note) for measure in self.measures),
            ("size, MB", packed, f"{size} in full precision"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON types, with None for numbers that are not finite."""
        left_out = ("sampler", "images", "inputs", "measures")
        known = {key: value for key, value in vars(self).items() if key not in left_out}
        numbers: dict[str, Any] = _finite(
            {**self.sampler.to_dict(), **known, **self.values, "noise_error": self.noise_error}
        )
        return numbers


def _finite(value: Any) -> Any:
    """Return plain JSON types, with None for NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def compare(
    model: DiffusionPipeline,
    *,
    original: DiffusionPipeline,
    sampler: Sampler,
    count: int = 64,
    seed: int = 1000,
    features: Features | str = "pixels",
    features_name: str | None = None,
    statistics: DatasetStatistics | None = None,
    state: str | Path | None = None,
    progress: Progress = shown_progress,
) -> Comparison:
    """Compare a quantized pipeline with its original: images from equal noise, and predictions.

    Both denoisers predict from the same recorded inputs. Images are compared batch by batch, so
    memory does not limit their number. On a CPU, a comparison that resumes from its state has the
    same bits as an uninterrupted one.

    Args:
        model: The quantized pipeline.
        original: The same pipeline in full precision.
        sampler: How to call both pipelines.
        count: Number of images in each set, at least two.
        seed: Seed of the noise. `seed + 1` is for the other full-precision images, `seed + 2` for
            the trajectories.
        features: The features for Frechet distances: a function of images, or a name for
            `feature_network`.
        features_name: The name of the features in tables.
        statistics: Statistics of a data set, in the same features. Images of one channel are then
            converted to RGB.
        state: A safetensors file to resume from if it exists. It is saved every minute, or less
            often if saving takes long. It is not deleted at the end.
        progress: Called as each stage advances.

    Raises:
        InputError: If `model` is not `original` quantized, a pipeline takes other conditions than
            those of the sampler, the statistics are of other features or of images of another size,
            or the state is of another comparison or cannot be written.
    """
    for name, pipe in (("model", model), ("original", original)):
        check_type(name, pipe, DiffusionPipeline)
    check_type("sampler", sampler, Sampler)
    check_whole("count", count, 2)
    check_whole("seed", seed, 0, MAX_SEED - 2)
    if not isinstance(features, str):
        check_callable("features", features)
    if statistics is not None:
        check_type("statistics", statistics, DatasetStatistics)
    pairs = denoiser_pairs(original, model)
    sampler.arguments(original)
    network = feature_network(features) if isinstance(features, str) else features
    name = features if isinstance(features, str) else getattr(features, "__name__", "")
    label: str = features_name or name
    if statistics is not None:
        statistics.check_features(network)
    metrics = ImageMetrics(Setting(network, label, statistics))
    calls = [(model, seed), (original, seed), (original, seed + 1)]
    file = None
    if state is not None:
        fingerprint = comparison_fingerprint(calls, sampler, count, statistics)
        file = Autosave(check_path("state", state), STATE, fingerprint)
        file.restore(metrics)
    done = counted(progress, "images of both, and of another seed", count)
    done(metrics.count)
    batches = [sampler.batches(pipe, count, noise, metrics.count) for pipe, noise in calls]
    for sets in zip(*batches, strict=True):
        metrics.update(ImageSets(*sets))
        if file is not None and metrics.count < count:
            file.save(metrics)
        done(len(sets[0]))
    found = [
        compare_predictions(
            select_denoisers(original, name), pair, sampler=sampler, seed=seed + 2,
            progress=of_part(progress, name) if len(pairs) > 1 else progress,
        ).of_component(name, pairs)
        for name, pair in pairs.items()
    ]  # fmt: skip
    full, quantized = zip(*pairs.values(), strict=True)
    return Comparison(
        sampler=sampler,
        count=count,
        seed=seed,
        measures=metrics.measures(),
        images=metrics.images,
        timesteps=[each for one in found for each in one.timesteps],
        trajectories=sampler.batch,
        bytes=(sum(map(packed_size, full)), sum(map(packed_size, quantized))),
        noise_errors=[each for one in found for each in one.noise_errors],
        noise_sqnr=[each for one in found for each in one.noise_sqnr],
        layers={name: ratio for one in found for name, ratio in one.layers.items()},
        inputs={name: seen for one in found for name, seen in one.inputs.items()},
    )
