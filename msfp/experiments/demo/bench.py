"""Quantizing and measuring the reference model by every method, side by side."""

from __future__ import annotations

import copy
import os
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import DDIMPipeline

from msfp.checkpoint.io import packed_size
from msfp.config import QuantizationConfig, RefinementConfig, Scheme
from msfp.evaluation.prediction_errors import noise_errors
from msfp.evaluation.whole_sets import FrechetDistance, paired_psnr
from msfp.experiments.demo.results import FULL_PRECISION, METHODS, Method, Results, Row, Settings
from msfp.experiments.reference.digits import digits
from msfp.experiments.reference.features import digit_features
from msfp.experiments.reference.pipelines import quality, reference_pipeline
from msfp.pipelines.recording import record_trajectories
from msfp.pipelines.trajectories import Trajectories
from msfp.ptq.quantization import pack, quantize
from msfp.schedulers.denoising_factors import denoising_factors
from msfp.search.observers import calibrate
from msfp.search.summary import LayerSummary
from msfp.support.progress import Progress, no_progress, of_part
from msfp.training.config import FinetuneConfig
from msfp.training.finetuning import finetune

KEPT_IMAGES = 64


class Bench:
    """The data that all methods share, computed once from the full-precision model."""

    def __init__(
        self,
        config: QuantizationConfig,
        settings: Settings,
        seed: int,
        progress: Progress = no_progress,
    ) -> None:
        self.config, self.settings, self.seed, self.progress = config, settings, seed, progress
        self.pipe = reference_pipeline()
        calls = settings.sampler.calls(settings.calibration, seed + 1)
        self.calibration = calibrate(self.pipe, calls=calls, progress=progress)
        self.training = self._record("trajectories", settings.trajectories, seed + 2)
        self.held_out = self._record("held-out trajectories", settings.held_out, seed + 3)
        self.factors = denoising_factors(self.pipe.scheduler, settings.sampler.steps)

    def _record(self, name: str, count: int, seed: int) -> Trajectories:
        calls = self.settings.sampler.calls(count, seed)
        progress = of_part(self.progress, name)
        return record_trajectories(self.pipe, calls=calls, progress=progress)

    def sample(self, name: str, pipe: DDIMPipeline) -> torch.Tensor:
        """Return the images of a pipeline; the noise is the same for all pipelines."""
        progress = of_part(self.progress, name)
        return self.settings.sampler(pipe, self.settings.images, self.seed + 4, progress=progress)

    def searched(
        self, scheme: Scheme, refined: bool = False
    ) -> tuple[DDIMPipeline, list[LayerSummary], float]:
        """Return a trainable quantized copy of the pipeline, its layers, and the seconds."""
        pipe = copy.deepcopy(self.pipe)
        started = time.perf_counter()
        refinement = RefinementConfig(seed=self.seed) if refined else None
        layers = quantize(
            pipe,
            replace(self.config, scheme=scheme, refine=refinement),
            calibration=self.calibration,
            trajectories=self.training if refined else None,
            progress=of_part(self.progress, scheme),
        )
        return pipe, layers, time.perf_counter() - started

    def finetune(self, pipe: DDIMPipeline, method: Method, seed: int) -> None:
        """Fine-tune and pack a trainable pipeline in place, with the settings of a method."""
        config = FinetuneConfig(
            hub=method.hub,
            steps=self.settings.finetune,
            dfa_power=method.dfa_power,
            seed=seed,
        )
        finetune(
            pipe,
            config,
            trajectories=self.training,
            factors=self.factors,
            progress=of_part(self.progress, method.name),
        )

    def measure(
        self, name: str, pipe: DDIMPipeline, layers: list[LayerSummary], seconds: float
    ) -> tuple[Row, torch.Tensor]:
        """Return the measurements of a pipeline that need no other pipeline, and its images."""
        images = self.sample(name, pipe)
        errors = noise_errors(pipe, trajectories=self.held_out)
        row = Row(
            method=name,
            noise_error=statistics.mean(errors),
            psnr=None,
            frechet=0.0,
            unsigned_layers=sum(layer.unsigned for layer in layers),
            bytes=packed_size(pipe.unet),
            seconds=seconds,
            errors=errors,
        )
        return row, images


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool with a worker for each core; torch uses one thread in each worker.

    Methods then run in parallel, and their results do not depend on the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        workers = min(cores(), len(METHODS))
        set_one = torch.set_num_threads
        with ThreadPoolExecutor(workers, initializer=set_one, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def run(
    config: QuantizationConfig, settings: Settings, seed: int, progress: Progress = no_progress
) -> Results:
    """Quantize the reference model by every method and measure each.

    Args:
        config: Bit widths; its scheme is replaced by each method's.
        settings: Numbers of images, trajectories and steps.
        seed: Seed of all randomness.
        progress: Called with the progress of each stage, from several threads.

    Returns:
        The results.
    """
    stop = threading.Event()

    def stoppable(stage: str, done: int, total: int, note: str = "", /) -> None:
        if stop.is_set():
            raise InterruptedError
        progress(stage, done, total, note)

    with one_thread_each() as pool:
        try:
            return _run(Bench(config, settings, seed, stoppable), pool)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(bench: Bench, pool: ThreadPoolExecutor) -> Results:
    wanted = list(dict.fromkeys((method.scheme, method.refined) for method in METHODS))
    full = pool.submit(bench.measure, FULL_PRECISION, bench.pipe, [], 0.0)
    searches = {each: pool.submit(bench.searched, *each) for each in wanted}
    searched = {each: search.result() for each, search in searches.items()}

    def work(method: Method) -> tuple[DDIMPipeline, Row, torch.Tensor]:
        pipe, layers, seconds = searched[method.scheme, method.refined]
        pipe, started = copy.deepcopy(pipe), time.perf_counter()
        if method.hub:
            bench.finetune(pipe, method, bench.seed)
        else:
            pack(pipe)
        seconds += time.perf_counter() - started
        return pipe, *bench.measure(method.name, pipe, layers, seconds)

    # The slowest methods start first, so that all workers finish at about the same time.
    order = sorted(METHODS, key=lambda method: -method.hub)
    futures = {method: pool.submit(work, method) for method in order}
    done = [(bench.pipe, *full.result())] + [futures[method].result() for method in METHODS]
    return _results(bench, done, searched["mixup", False][1])


def _results(
    bench: Bench,
    done: list[tuple[DDIMPipeline, Row, torch.Tensor]],
    layers: list[LayerSummary],
) -> Results:
    """Return all measurements; compare each method's images with those of full precision."""
    distance = FrechetDistance(digit_features, (digits()[0] + 1) / 2)
    reference = done[0][2]
    for index, (_, row, images) in enumerate(done):
        row.frechet = distance(images)
        row.psnr = paired_psnr(images, reference) if index else None
    last = done[-1][0]
    with torch.no_grad():
        choices = last.unet.router(bench.held_out.timesteps).argmax(dim=-1)
    measured, label = quality(), bench.settings.label
    tuned = measured["finetune_noise_errors"][label]
    default = bench.config == QuantizationConfig()
    return Results(
        config=bench.config,
        settings=bench.settings,
        seed=bench.seed,
        timesteps=bench.held_out.timesteps.tolist(),
        seed_noise=measured["frechet_model"][label],
        spread=statistics.stdev(tuned) / statistics.mean(tuned) if default else None,
        rows=[row for _, row, _ in done],
        layers=layers,
        routing=choices.T.tolist(),
        images={row.method: images[:KEPT_IMAGES] for _, row, images in done},
        inputs=bench.calibration.inputs,
        pipe=last,
    )
