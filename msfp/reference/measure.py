"""Measure the reference model that ships and write its quality: `python -m msfp.reference.measure`.

The Frechet distance depends on the seed of the noise and on the number of images. Here the
full-precision model is sampled with several seeds, and the real digits are split at random, to
state how far a distance moves with nothing changed: the noise floor of every comparison. The
noise-prediction error of a fine-tuned model depends on the seed of the fine-tuning in the same way.
"""

from __future__ import annotations

import copy
import json
import statistics
from typing import Any

import torch
from rich.progress import track

from msfp.config import QuantizationConfig
from msfp.demo.bench import Bench, one_thread_each
from msfp.demo.results import FULL, METHODS, QUICK, Settings
from msfp.evaluate import FrechetDistance, noise_errors
from msfp.features import Features
from msfp.plots import save_image_grid
from msfp.reference import PIPELINE_FOLDER, QUALITY_FILE, ddim_pipeline, digit_features
from msfp.reference.digits import digits

SEEDS = range(100, 108)
FINETUNE_SEEDS = range(4)


def real_halves(features: Features, real: torch.Tensor) -> list[float]:
    """Return the distance of a random half of the real digits from the other, for each seed."""
    halves = []
    for seed in SEEDS:
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
        first, second = real[order[: len(real) // 2]], real[order[len(real) // 2 :]]
        halves.append(FrechetDistance(features, first)(second))
    return halves


def model_distances(settings: Settings, distance: FrechetDistance) -> list[float]:
    """Return the distance of the full-precision model's images for each seed of the noise."""
    pipe = ddim_pipeline()

    def images(seed: int) -> torch.Tensor:
        return settings.sampler(copy.deepcopy(pipe), settings.images, seed)

    with one_thread_each() as pool:
        sampled = pool.map(images, SEEDS)
        return [distance(each) for each in track(sampled, settings.label, total=len(SEEDS))]


def finetune_errors(settings: Settings) -> list[float]:
    """Return the noise-prediction error of the demo's single LoRA for each fine-tuning seed."""
    bench = Bench(QuantizationConfig(), settings, seed=0, advance=lambda *_: None)
    method = next(method for method in METHODS if method.hub == 1 and method.scheme == "mixup")
    searched, _, _ = bench.searched("mixup")

    def error(seed: int) -> float:
        pipe = copy.deepcopy(searched)
        bench.finetune(pipe, method, seed)
        return statistics.mean(noise_errors(pipe.unet, bench.held_out))

    with one_thread_each() as pool:
        errors = pool.map(error, FINETUNE_SEEDS)
        return list(track(errors, "fine-tuning seeds", total=len(FINETUNE_SEEDS)))


def main() -> None:
    """Write quality.json and a grid of samples beside the model."""
    features, real = digit_features, (digits()[0] + 1) / 2
    distance = FrechetDistance(features, real)
    quality: dict[str, Any] = {
        "sampler": "DDIM, trailing timesteps",
        "seeds": list(SEEDS),
        "frechet_real_halves": real_halves(features, real),
        "frechet_model": {run.label: model_distances(run, distance) for run in (QUICK, FULL)},
        "finetune_noise_errors": {run.label: finetune_errors(run) for run in (QUICK, FULL)},
    }
    QUALITY_FILE.write_text(json.dumps(quality, indent=1) + "\n")
    save_image_grid(FULL.sampler(ddim_pipeline(), 64, 0), PIPELINE_FOLDER / "samples.png")


if __name__ == "__main__":
    main()
