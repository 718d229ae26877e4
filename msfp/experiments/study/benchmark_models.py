"""The benchmark models: how each reference model is sampled and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from msfp.errors import InputError
from msfp.evaluation.features import Features
from msfp.experiments.reference.digits import digits
from msfp.experiments.reference.features import digit_features, photograph_features
from msfp.experiments.reference.models import DIGIT_CLASSES
from msfp.experiments.reference.names import ReferenceName
from msfp.experiments.reference.photographs import training_crops
from msfp.experiments.reference.pipelines import FOLDER, reference_pipeline
from msfp.experiments.study.ablation import Row
from msfp.pipelines.sampler import Sampler
from msfp.schedulers.samplers import use_sampler
from msfp.training.config import FinetuneConfig

REAL_CROPS = 4096
"""Crops of photographs that the colour model's images are compared with."""


@dataclass(frozen=True)
class Settings:
    """Numbers of images and trajectories of a row.

    Attributes:
        images: Images sampled for comparison.
        calibration: Images sampled to collect layer inputs.
        trajectories: Recorded trajectories to train on.
        held_out: Recorded trajectories to measure the noise-prediction error on.
        batch: Images in one call of the pipeline.
    """

    images: int
    calibration: int
    trajectories: int
    held_out: int
    batch: int


@dataclass(frozen=True)
class BenchmarkModel:
    """A reference model in the study.

    Attributes:
        label: Name in tables.
        name: Name of the reference model.
        real: Returns the real images, in [0, 1], that Frechet distances are measured from.
        features: Features of the Frechet distances.
        settings: Numbers of images and trajectories of its rows.
        conditions: Class labels, used in turn; empty for an unconditional model.
        guidance_scale: Scale of classifier-free guidance, or None. The guidance branch with the
            class comes first.
    """

    label: str
    name: ReferenceName
    real: Callable[[], torch.Tensor]
    features: Features
    settings: Settings
    conditions: tuple[int, ...] = ()
    guidance_scale: float | None = None

    def load(self, folder: Path) -> Any:
        """Return the pipeline in a folder."""
        return reference_pipeline(self.name, folder=folder)

    def sampler(self, steps: int) -> Sampler:
        """Return the sampler of the model with the given number of steps."""
        return Sampler(steps, self.settings.batch, self.conditions, self.guidance_scale)

    def finetune(self, row: Row) -> FinetuneConfig | None:
        """Return the config of a row's fine-tuning, with the guidance branches of the model."""
        if self.guidance_scale is None:
            return row.finetune()
        branches = (self.guidance_scale, 1 - self.guidance_scale)
        return row.finetune(guidance_branches=branches, guidance_rows=self.settings.batch)


def _real_digits() -> torch.Tensor:
    return (digits()[0] + 1) / 2


def _real_crops() -> torch.Tensor:
    return (training_crops()[0][:REAL_CROPS] + 1) / 2


BENCHMARK_MODELS = {
    "digits-ddpm": BenchmarkModel(
        "UNet, handwritten digits",
        "digits",
        _real_digits,
        digit_features,
        Settings(images=256, calibration=64, trajectories=256, held_out=64, batch=64),
    ),
    "digits-dit": BenchmarkModel(
        "class-conditional DiT, handwritten digits",
        "digits-transformer",
        _real_digits,
        digit_features,
        Settings(images=256, calibration=64, trajectories=128, held_out=32, batch=32),
        conditions=tuple(range(DIGIT_CLASSES)),
        guidance_scale=2.0,
    ),
    "colour-ddpm": BenchmarkModel(
        "UNet with attention, crops of photographs",
        "photographs",
        _real_crops,
        photograph_features,
        Settings(images=128, calibration=32, trajectories=96, held_out=32, batch=32),
    ),
}
"""The benchmark models by the names of their folders."""


def model_folder(model: str, training: int, trained: Path | None) -> Path:
    """Return the folder of a full-precision model.

    Args:
        model: Name of the model.
        training: Which independently trained model; 0 ships with the package.
        trained: Folder of the other models, each in `TRAINING/MODEL` as the training script writes
            it; or None.

    Raises:
        InputError: If the model is missing.
    """
    folder = _folder(model, training, trained)
    if training and trained is None:
        raise InputError(
            f"models must name a folder of independently trained models for {model}/{training}"
        )
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} has no model: train it with "
            "`python -m msfp.experiments.reference.train "
            f"{model} {folder.parent} --seed {training}`"
        )
    return folder


def has_model(model: str, training: int, trained: Path | None) -> bool:
    """Return whether `model_folder` would find a model."""
    there = training == 0 or trained is not None
    return there and (_folder(model, training, trained) / "model_index.json").is_file()


def _folder(model: str, training: int, trained: Path | None) -> Path:
    return FOLDER / model if training == 0 else (trained or Path()) / str(training) / model


def full_precision(
    model: str, training: int, trained: Path | None, sampler: str
) -> DiffusionPipeline:
    """Return a full-precision pipeline with the named sampler."""
    pipe = BENCHMARK_MODELS[model].load(model_folder(model, training, trained))
    use_sampler(pipe, sampler)
    return pipe
