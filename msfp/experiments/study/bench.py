"""Running rows of the study: the data that rows share, and the measurement of each row."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from msfp.checkpoint.io import packed_size
from msfp.evaluation.prediction_errors import noise_errors
from msfp.evaluation.whole_sets import FrechetDistance, paired_psnr, paired_sqnr, paired_ssim
from msfp.experiments.study.ablation import FULL_PRECISION, REVISION, Row
from msfp.experiments.study.benchmark_models import BENCHMARK_MODELS, full_precision
from msfp.experiments.study.machine import machine
from msfp.experiments.study.store import VERSION, Record
from msfp.layers.trainable import trainable_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.recording import record_trajectories
from msfp.pipelines.trajectories import Trajectories
from msfp.ptq.quantization import pack, quantize
from msfp.schedulers.denoising_factors import denoising_factors
from msfp.search.calibration import Calibration
from msfp.search.observers import calibrate
from msfp.support.memory import forget_peak, peak_bytes
from msfp.training.finetuning import finetune

FORWARDS = 5
"""Number of forwards that are timed for the median."""


class Bench:
    """The data that rows of one model, sampler and seed share, computed at first use.

    Args:
        row: One of these rows.
        trained: Folder of independently trained models, or None.
    """

    def __init__(self, row: Row, trained: Path | None) -> None:
        self.seed, self.steps = row.seed, row.steps
        self.model = BENCHMARK_MODELS[row.model]
        self.settings = self.model.settings
        self.sampler = self.model.sampler(row.steps)
        self.open = functools.partial(full_precision, row.model, row.training, trained, row.sampler)
        self.seconds: dict[str, float] = {}

    @staticmethod
    def key(row: Row) -> tuple[Any, ...]:
        """Return the fields that rows of one bench have in common."""
        return row.model, row.training, row.sampler, row.steps, row.seed

    def _noise(self, purpose: int) -> int:
        """Return the noise seed for one purpose; it is unique over all purposes and seeds."""
        return 10 * self.seed + purpose

    @functools.cached_property
    def calibration(self) -> Calibration:
        """The layer inputs of the full-precision model."""
        calls = self.sampler.calls(self.settings.calibration, self._noise(1))
        with _timed(self.seconds, "calibrate"):
            return calibrate(self.open(), calls=calls)

    @functools.cached_property
    def training(self) -> Trajectories:
        """Trajectories to fine-tune on."""
        with _timed(self.seconds, "record"):
            calls = self.sampler.calls(self.settings.trajectories, self._noise(2))
            return record_trajectories(self.open(), calls=calls)

    @functools.cached_property
    def held_out(self) -> Trajectories:
        """Trajectories to measure errors on."""
        calls = self.sampler.calls(self.settings.held_out, self._noise(3))
        return record_trajectories(self.open(), calls=calls)

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """The images of the full-precision model, from the same noise as those of every row."""
        return self.images(self.open())

    @functools.cached_property
    def sampled_distance(self) -> FrechetDistance:
        """Frechet distance from images of the full-precision model, from other noise."""
        return FrechetDistance(self.model.features, self.images(self.open(), 5))

    def images(self, pipe: DiffusionPipeline, purpose: int = 4) -> torch.Tensor:
        """Return the images of a pipeline; the default noise is that of paired comparisons."""
        return self.sampler(pipe, self.settings.images, self._noise(purpose))

    def run(self, row: Row) -> tuple[Record, torch.Tensor]:
        """Quantize, fine-tune and measure one row; return its record and its images."""
        pipe = self.open()
        seconds, peak = self._prepare(pipe, row)
        full = row.recipe == FULL_PRECISION
        images = self.reference if full else self.images(pipe)
        quantization, tune = row.quantization(), self.model.finetune(row)
        record = {
            "version": VERSION,
            "name": row.name,
            "row": asdict(row),
            "revision": REVISION,
            "settings": asdict(self.settings),
            "quantization": None if quantization is None else quantization.to_dict(),
            "finetune": None if tune is None else tune.to_dict(),
            "versions": machine(),
            "seconds": self.seconds | seconds | {"forward": self._forward(pipe)},
            "peak_bytes": peak,
            "bytes": packed_size(denoiser_of(pipe)),
            "file_bytes": _file_size(denoiser_of(pipe)),
            "frechet": real_distance(row.model)(images),
            "frechet_sampled": self.sampled_distance(images),
        }
        if not full:
            record |= self._compared(pipe, images)
        return record, images

    def _prepare(
        self, pipe: DiffusionPipeline, row: Row
    ) -> tuple[dict[str, float], dict[str, int | None]]:
        """Quantize and fine-tune a pipeline in place; return CPU seconds and peak memory of each.

        The data that rows share are computed before the clock starts.
        """
        seconds: dict[str, float] = {"quantize": 0.0, "finetune": 0.0}
        peak: dict[str, int | None] = {}
        config, tuning = row.quantization(), self.model.finetune(row)
        if config is None:
            return seconds, peak
        calibration, trajectories, denoiser = self.calibration, self.training, denoiser_of(pipe)
        with _timed(seconds, "quantize", peak):
            quantize(pipe, config, calibration=calibration, trajectories=trajectories)
        if tuning is None:
            if trainable_layers(denoiser):
                pack(denoiser)
            return seconds, peak
        with _timed(seconds, "finetune", peak):
            factors = denoising_factors(pipe.scheduler, self.steps)
            finetune(pipe, tuning, trajectories=trajectories, factors=factors)
        return seconds, peak

    def _compared(self, pipe: DiffusionPipeline, images: torch.Tensor) -> dict[str, Any]:
        """Return the measurements against full precision, at equal inputs and at equal noise."""
        errors = noise_errors(pipe, trajectories=self.held_out)
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
    benchmark = BENCHMARK_MODELS[model]
    return FrechetDistance(benchmark.features, benchmark.real())


@contextmanager
def _timed(
    seconds: dict[str, float], stage: str, peak: dict[str, int | None] | None = None
) -> Iterator[None]:
    """Record the CPU seconds of a stage and, if `peak` is given, the peak memory of the process."""
    forget_peak()
    started = time.process_time()
    yield
    seconds[stage] = time.process_time() - started
    if peak is not None:
        peak[stage] = peak_bytes()


def _file_size(denoiser: Any) -> int:
    """Return the size in bytes of the folder that a denoiser is saved to."""
    with tempfile.TemporaryDirectory() as folder:
        denoiser.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).iterdir())
