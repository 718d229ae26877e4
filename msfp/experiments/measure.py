"""Measure a reference model that ships: `python -m msfp.experiments.measure MODEL`.

The Frechet distance depends on the seed of the noise and on the number of images. This script
samples the full-precision model with several seeds and splits the real images at random. The
results show how much the distance varies when nothing is changed: the noise floor of every
comparison. In the same way, the noise-prediction error of a fine-tuned model depends on the seed of
the fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.progress import track

from msfp.config import QuantizationConfig
from msfp.evaluation.features import Features
from msfp.evaluation.prediction_errors import noise_errors
from msfp.evaluation.whole_sets import FrechetDistance
from msfp.experiments.demo.bench import Bench, one_thread_each
from msfp.experiments.demo.results import FULL, METHODS, QUICK, Settings
from msfp.experiments.reference.digits import digits
from msfp.experiments.reference.features import digit_features
from msfp.experiments.reference.models import DIGITS
from msfp.experiments.reference.pipelines import FOLDER, QUALITY_FILE, reference_pipeline
from msfp.experiments.study.benchmark_models import BENCHMARK_MODELS, BenchmarkModel
from msfp.pipelines.sampler import Sampler
from msfp.reports.figures import save_image_grid

SEEDS = range(100, 108)
FINETUNE_SEEDS = range(4)
STEPS = 20


def real_halves(features: Features, real: torch.Tensor) -> list[float]:
    """Return the distance between two random halves of the real images, for each seed."""
    halves = []
    for seed in SEEDS:
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
        first, second = real[order[: len(real) // 2]], real[order[len(real) // 2 :]]
        halves.append(FrechetDistance(features, first)(second))
    return halves


def model_distances(
    pipe: DiffusionPipeline, sampler: Sampler, count: int, distance: FrechetDistance
) -> list[float]:
    """Return the distance of the full-precision model's images for each seed of the noise."""

    def images(seed: int) -> torch.Tensor:
        return sampler(copy.deepcopy(pipe), count, seed)

    with one_thread_each() as pool:
        sampled = pool.map(images, SEEDS)
        return [distance(each) for each in track(sampled, f"{count} images", total=len(SEEDS))]


def finetune_errors(settings: Settings) -> list[float]:
    """Return the noise-prediction error of the demo's single LoRA for each fine-tuning seed."""
    bench = Bench(QuantizationConfig(), settings, seed=0)
    method = next(method for method in METHODS if method.hub == 1 and method.scheme == "mixup")
    searched, _, _ = bench.searched("mixup")

    def error(seed: int) -> float:
        pipe = copy.deepcopy(searched)
        bench.finetune(pipe, method, seed)
        return statistics.mean(noise_errors(pipe, trajectories=bench.held_out))

    with one_thread_each() as pool:
        errors = pool.map(error, FINETUNE_SEEDS)
        return list(track(errors, "fine-tuning seeds", total=len(FINETUNE_SEEDS)))


def digits_quality() -> dict[str, Any]:
    """Return the noise floors of the digits model, for the demo's settings and its fine-tuning."""
    real = (digits()[0] + 1) / 2
    pipe, distance = reference_pipeline(), FrechetDistance(digit_features, real)
    runs = (QUICK, FULL)
    return {
        "sampler": "DDIM, trailing timesteps",
        "seeds": list(SEEDS),
        "frechet_real_halves": real_halves(digit_features, real),
        "frechet_model": {
            run.label: model_distances(pipe, run.sampler, run.images, distance) for run in runs
        },
        "finetune_noise_errors": {run.label: finetune_errors(run) for run in runs},
    }


def study_quality(model: BenchmarkModel, pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the noise floors of a model at the study's settings."""
    real, count, sampler = model.real(), model.settings.images, model.sampler(STEPS)
    distance = FrechetDistance(model.features, real)
    return {
        "sampler": "DDIM, trailing timesteps",
        "seeds": list(SEEDS),
        "frechet_real_halves": real_halves(model.features, real),
        "frechet_model": {
            f"{STEPS} steps, {count} images": model_distances(pipe, sampler, count, distance)
        },
    }


def main() -> None:
    """Write the quality file of a model, and a grid of its samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(BENCHMARK_MODELS))
    name: str = parser.parse_args().model
    model, folder = BENCHMARK_MODELS[name], FOLDER / name
    pipe = model.load(folder)
    file = QUALITY_FILE if name == DIGITS.name else folder / "quality.json"
    measured = digits_quality() if name == DIGITS.name else study_quality(model, pipe)
    file.write_text(json.dumps(measured, indent=1) + "\n")
    columns = len(model.conditions) or 8
    images = model.sampler(STEPS)(pipe, 8 * columns, 0)
    save_image_grid(images, folder / "samples.png", columns)


if __name__ == "__main__":
    main()
