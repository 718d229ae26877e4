"""Running rows of the study: what rows share, and the measurement of each."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from msfp.calibration import Calibration
from msfp.checkpoint import packed_size
from msfp.denoiser import denoiser_of
from msfp.dfa import denoising_factors
from msfp.evaluate import (
    FrechetDistance,
    noise_errors,
    paired_psnr,
    paired_sqnr,
    paired_ssim,
)
from msfp.fine_tuning import finetune
from msfp.observation import calibrate
from msfp.open_layers import open_layers
from msfp.quantization import quantize, seal
from msfp.sampling import PipelineCall
from msfp.study.ladder import FULL_PRECISION, Row
from msfp.study.store import Record
from msfp.study.subjects import SUBJECTS, full_precision
from msfp.trajectories import Trajectories, record_trajectories
from msfp.versions import versions

FORWARDS = 5
"""Forwards of which the median time is taken."""


class Bench:
    """What rows of one model, sampler and seed share, made when first asked for.

    Args:
        row: One of them.
        trained: Folder of independently trained models, or None.
    """

    def __init__(self, row: Row, trained: Path | None) -> None:
        self.seed, self.steps = row.seed, row.steps
        self.subject = SUBJECTS[row.model]
        self.settings = self.subject.settings
        self.sampler = self.subject.sampler(row.steps)
        self.open = functools.partial(full_precision, row.model, row.training, trained, row.sampler)

    @staticmethod
    def key(row: Row) -> tuple[Any, ...]:
        """Return what rows of one bench have in common."""
        return row.model, row.training, row.sampler, row.steps, row.seed

    def _noise(self, purpose: int) -> int:
        """Return the seed of the noise of one purpose, no two the same over all seeds."""
        return 10 * self.seed + purpose

    @functools.cached_property
    def calibration(self) -> Calibration:
        """What the layers of the full-precision model read."""
        return calibrate(self.open(), self.sampler.calls(self.settings.calibration, self._noise(1)))

    @functools.cached_property
    def training(self) -> Trajectories:
        """Trajectories to fine-tune on."""
        return record_trajectories(self.open(), self._training_calls())

    def _training_calls(self) -> list[PipelineCall]:
        return self.sampler.calls(self.settings.trajectories, self._noise(2))

    @functools.cached_property
    def held_out(self) -> Trajectories:
        """Trajectories to measure on."""
        calls = self.sampler.calls(self.settings.held_out, self._noise(3))
        return record_trajectories(self.open(), calls)

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """The images of the full-precision model, from the noise that every row's start from."""
        return self.images(self.open())

    def images(self, pipe: DiffusionPipeline) -> torch.Tensor:
        """Return the images of a pipeline."""
        return self.sampler(pipe, self.settings.images, self._noise(4))

    def run(self, row: Row) -> tuple[Record, torch.Tensor]:
        """Quantize, fine-tune and measure as a row asks; return its record and its images."""
        pipe = self.open()
        quantizing, tuning = self._prepare(pipe, row)
        images = self.reference if row.recipe == FULL_PRECISION else self.images(pipe)
        quantization, tune = row.quantization(), self.subject.finetune(row)
        record = {
            "name": row.name,
            "row": asdict(row),
            "settings": asdict(self.settings),
            "quantization": None if quantization is None else quantization.to_dict(),
            "finetune": None if tune is None else tune.to_dict(),
            "versions": machine(),
            "seconds": {"quantize": quantizing, "finetune": tuning, "forward": self._forward(pipe)},
            "bytes": packed_size(denoiser_of(pipe)),
            "frechet": real_distance(row.model)(images),
        }
        if row.recipe != FULL_PRECISION:
            record |= self._compared(pipe, images)
        return record, images

    def _prepare(self, pipe: DiffusionPipeline, row: Row) -> tuple[float, float]:
        """Quantize and fine-tune a pipeline in place; return the CPU seconds that each took."""
        config, tuning = row.quantization(), self.subject.finetune(row)
        if config is None:
            return 0.0, 0.0
        # Made before the clock starts.
        calibration, trajectories, denoiser = self.calibration, self.training, denoiser_of(pipe)
        started = time.process_time()
        quantize(pipe, config, calibration=calibration, trajectories=trajectories)
        quantized = time.process_time()
        if tuning is not None:
            factors = denoising_factors(pipe.scheduler, self.steps)
            finetune(
                denoiser, trajectories, tuning, factors=factors,
                own_path=lambda: record_trajectories(pipe, self._training_calls()),
            )  # fmt: skip
        elif open_layers(denoiser):
            seal(denoiser)
        return quantized - started, time.process_time() - quantized

    def _compared(self, pipe: DiffusionPipeline, images: torch.Tensor) -> dict[str, Any]:
        """Return what is measured against full precision, at equal inputs and at equal noise."""
        errors = noise_errors(denoiser_of(pipe), self.held_out)
        return {
            "noise_error": statistics.mean(errors),
            "noise_errors": errors,
            "timesteps": self.held_out.timesteps.tolist(),
            "psnr": paired_psnr(images, self.reference),
            "ssim": paired_ssim(images, self.reference),
            "sqnr": paired_sqnr(images, self.reference),
        }

    def _forward(self, pipe: DiffusionPipeline) -> float:
        """Return the median CPU seconds of a forward of the denoiser on all held-out rows."""
        denoiser, rows = denoiser_of(pipe), torch.arange(self.held_out.samples.shape[1])
        seconds = []
        for _ in range(FORWARDS):
            started = time.process_time()
            with torch.no_grad():
                self.held_out.predict(denoiser, torch.zeros_like(rows), rows)
            seconds.append(time.process_time() - started)
        return statistics.median(seconds)


@functools.cache
def real_distance(model: str) -> FrechetDistance:
    """Return the Frechet distance from the real images of a model."""
    subject = SUBJECTS[model]
    return FrechetDistance(subject.features, subject.real())


def machine() -> dict[str, str]:
    """Return versions, and what ran them."""
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return versions() | {"threads": str(threads), "cpu": capability}
