"""From a packed pipeline and its full-precision one to a fine-tuned one, and what that brought."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from msfp.errors import InputError
from msfp.evaluation.comparison import check_pair
from msfp.evaluation.metrics import noise_errors, paired_psnr
from msfp.layers.lora.talora import precompute_routing, routing_of
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.sampler import Sampler
from msfp.pipelines.trajectories import Trajectories, record_trajectories
from msfp.reports.finetuning_page import SHOWN, Row, TuningReport
from msfp.schedulers.denoising_factors import denoising_factors
from msfp.support.progress import Advance, counted
from msfp.training.config import FinetuneConfig
from msfp.training.data.clean_images import chosen_files, clean_images
from msfp.training.data.first_call import first_question
from msfp.training.data.noised_images import data_trajectories
from msfp.training.finetuning import check_checkpointing, check_routing, finetune
from msfp.training.guidance import guidance_branches
from msfp.training.objective import loss_weights
from msfp.training.reopening import check_reopening, reopen
from msfp.training.state import History
from msfp.training.trainer import Status

MEASURED_IMAGES = 64


@dataclass(frozen=True)
class Extent:
    """How much is recorded.

    Attributes:
        trajectories: Images whose trajectories are trained on.
        held_out: Images of those that errors are measured on.
        seed: Of their noise.
    """

    trajectories: int
    held_out: int
    seed: int


class Tuning:
    """Fine-tunes one packed pipeline, perhaps in several ways.

    Args:
        full: The full-precision pipeline.
        quantized: The packed one, as loaded; it is not changed.
        sampler: How both are called.
        extent: How much is recorded.
        advance: Told of the progress of each stage of recording.
        config: What is to be trained, to be refused before anything is recorded.
        data: A folder of images, to train on them, noised, and not on the sampler's own samples.

    Raises:
        InputError: If the pipelines are of different models or samplers, the packed one cannot be
            trained, or not by the config, or the data cannot be read.
    """

    def __init__(
        self,
        full: DiffusionPipeline,
        quantized: DiffusionPipeline,
        sampler: Sampler,
        extent: Extent,
        advance: Advance,
        config: FinetuneConfig | None = None,
        data: Path | None = None,
    ) -> None:
        check_pair(denoiser_of(full), denoiser_of(quantized))
        check_same_sampler(full, quantized)
        check_reopening(denoiser_of(quantized), denoiser_of(full))
        self.full, self.quantized, self.sampler, self.extent = full, quantized, sampler, extent
        self.advance = advance
        scheduler, self.rows_at_once = first_question(full, sampler.calls(1, extent.seed)[0])
        factors, unknown = _factors(scheduler)
        power = 0.0
        if config is not None:
            power = config.denoising_power
            check_checkpointing(denoiser_of(quantized), config)
            check_routing(denoiser_of(full), config)
            _check_rates(config)
            _check_power(power, unknown)
        self.branches, self.branch_rows = guidance_branches(full, sampler, self.rows_at_once)
        self.data = data
        self.path = self._path() if data is None else self._path_of(data)
        self.factors, unknown = _recorded_factors(scheduler, factors, self.path.timesteps, unknown)
        _check_power(power, unknown)
        self.held_out = self._recorded("recording held-out", extent.held_out, extent.seed + 1)
        self.images = self._sampled("full precision", full)

    def _path(self) -> Trajectories:
        return self._recorded("recording trajectories", self.extent.trajectories, self.extent.seed)

    def _path_of(self, data: Path) -> Trajectories:
        """Return the trajectories of noised images."""
        seed = self.extent.seed
        calls = self.sampler.calls(self.extent.trajectories, seed)
        places = len(calls) * self.sampler.batch  # the last call is a whole batch as well
        files = chosen_files(data, places, len(self.sampler.conditions))
        reading = counted(self.advance, "reading images", len(files))
        images = clean_images(self.full, files, reading)
        progress = counted(self.advance, "recording noised images", len(calls))
        return data_trajectories(self.full, calls, images, seed=seed, progress=progress)

    def _recorded(self, stage: str, count: int, seed: int) -> Trajectories:
        calls = self.sampler.calls(count, seed)
        return record_trajectories(self.full, calls, counted(self.advance, stage, len(calls)))

    def _sampled(self, name: str, pipe: DiffusionPipeline) -> torch.Tensor:
        count = min(MEASURED_IMAGES, self.extent.held_out)
        progress = counted(self.advance, f"sampling {name}", count)
        return self.sampler(pipe, count, self.extent.seed + 2, progress)

    def measured(
        self, name: str, pipe: DiffusionPipeline, minutes: float = 0.0, best: int | None = None
    ) -> Row:
        """Return what can be measured of a pipeline.

        Args:
            name: What to call it.
            pipe: The packed one, or one that was fine-tuned.
            minutes: That its training took.
            best: The step of its training that gave it, where held-out errors chose that.
        """
        images = self._sampled(name, pipe)
        errors = noise_errors(denoiser_of(pipe), self.held_out, batch=self.rows_at_once)
        moved = None
        if self.factors is not None:
            timesteps = self.held_out.timesteps
            weights = loss_weights(timesteps, self.factors, 2.0, "none").tolist()
            moved = [error * weight for error, weight in zip(errors, weights, strict=True)]
        psnr = paired_psnr(images, self.images)
        return Row(name, errors, moved, psnr, images[:SHOWN], minutes, best)

    def tuned(
        self,
        config: FinetuneConfig,
        *,
        file: Path | None = None,
        resume: bool = False,
        tensorboard: Path | None = None,
        progress: Callable[[Status], None] | None = None,
    ) -> tuple[DiffusionPipeline, History, float]:
        """Fine-tune a copy of the packed pipeline; return it, what was measured, and the seconds.

        Args:
            config: What is trained and how; its branches are those of the pipeline's guidance.
            file: As for `finetune`.
            resume: As for `finetune`.
            tensorboard: As for `finetune`.
            progress: As for `finetune`.
        """
        pipe = _with_own_denoiser(self.quantized)
        denoiser, original = denoiser_of(pipe), denoiser_of(self.full)
        reopen(denoiser, original)
        calls = self.sampler.calls(self.extent.trajectories, self.extent.seed)
        started = time.monotonic()
        device = next(original.parameters()).device
        if config.shard:  # a whole one beside the parts would be in their way
            original.to("cpu")
        history = finetune(
            denoiser,
            self.path,
            replace(config, branches=self.branches, branch_rows=self.branch_rows),
            factors=self.factors,
            held_out=self.held_out,
            teacher=original,
            own_path=lambda: record_trajectories(pipe, calls),
            file=file,
            resume=resume,
            tensorboard=tensorboard,
            progress=progress,
        )
        original.to(device)
        return pipe, history, time.monotonic() - started

    def facts(self) -> dict[str, Any]:
        """Return how the pipelines were called, as plain JSON types."""
        kind = "labels" if isinstance(next(iter(self.sampler.conditions), ""), int) else "prompts"
        return {
            "sampler": type(self.full.scheduler).__name__,
            "sampler_steps": self.sampler.steps,
            "sampler_batch": self.sampler.batch,
            "guidance_scale": self.sampler.guidance_scale,
            "count": self.extent.trajectories,
            "held_out": self.extent.held_out,
            "seed": self.extent.seed,
            "dtype": str(self.full.dtype).removeprefix("torch."),
            **({} if self.data is None else {"data": str(self.data)}),
            **({kind: list(self.sampler.conditions)} if self.sampler.conditions else {}),
        }

    def report(
        self, title: str, names: dict[str, str], config: FinetuneConfig, rows: list[Row],
        history: History, pipe: DiffusionPipeline,
    ) -> TuningReport:  # fmt: skip
        """Return the report of a run that ended with a pipeline.

        Args:
            title: The heading.
            names: Of what was fine-tuned, and towards what.
            config: How.
            rows: What was measured.
            history: Of the training.
            pipe: The fine-tuned pipeline.
        """
        timesteps = self.held_out.timesteps
        return TuningReport(
            title, config, timesteps.tolist(), self.images, rows, history,
            routing_table(pipe, timesteps), names | self.facts(),
        )  # fmt: skip


def _factors(scheduler: SchedulerMixin) -> tuple[dict[float, float] | None, str]:
    """Return the factors of a grid where nothing is clipped; or None, and why."""
    try:
        return denoising_factors(scheduler, clipping="ignore"), ""
    except InputError as error:
        return None, str(error)


def _recorded_factors(
    scheduler: SchedulerMixin,
    factors: dict[float, float] | None,
    recorded: torch.Tensor,
    unknown: str,
) -> tuple[dict[float, float] | None, str]:
    """Return factors by the timesteps that the denoiser was given; or None, and why.

    Pipelines may divide the scheduler's timesteps, but keep their order.

    Args:
        scheduler: Its timesteps are set.
        factors: By those, or None.
        recorded: What the denoiser was given.
        unknown: Why there are none.
    """
    if factors is None:
        return None, unknown
    grid, given = scheduler.timesteps.tolist(), recorded.tolist()
    if len(grid) == len(given) and factors.keys() >= set(grid):
        factors = {asked: factors[own] for asked, own in zip(given, grid, strict=True)}
    try:
        loss_weights(recorded, factors, 1.0)
    except InputError:
        return None, f"the denoiser is asked at {given}, not at the sampler's {list(factors)}"
    return factors, ""


def _check_power(power: float, unknown: str) -> None:
    """Raise InputError if factors are wanted, and are not known for a reason."""
    if power > 0 and unknown:
        raise InputError(f"denoising_power must be 0 (--power 0), not {power}: {unknown}")


def _check_rates(config: FinetuneConfig) -> None:
    """Raise InputError unless something is trained."""
    if not trains(config):
        raise InputError(f"rates must leave something to be trained, not {config.rates}")


def trains(config: FinetuneConfig) -> bool:
    """Return whether a config trains anything that every denoiser has.

    Example:
        >>> rates = dict.fromkeys(("adapters", "weight_scales", "input_scales", "biases"), 0)
        >>> trains(FinetuneConfig(rates=rates)), trains(FinetuneConfig(rates=rates | {"norms": 0}))
        (True, False)
    """
    rates = asdict(config.rates)
    if not config.is_routed:
        del rates["router"]
    return any(rates.values())


def routing_table(pipe: DiffusionPipeline, timesteps: torch.Tensor) -> torch.Tensor | None:
    """Return the LoRA of each layer (rows) at each timestep, or None where there is no choice."""
    denoiser = denoiser_of(pipe)
    routing = routing_of(denoiser)
    if routing is None:
        return None
    precompute_routing(denoiser, timesteps)
    winners = [routing.table[timestep.item()] for timestep in timesteps]
    return torch.cat(winners).T


def ladder(config: FinetuneConfig) -> list[tuple[str, FinetuneConfig]]:
    """Return what a config is made of, one ingredient after the other, without the config itself.

    Example:
        >>> [name for name, _ in ladder(FinetuneConfig(hub=2, denoising_power=1.0))]
        ['scales, biases and norms alone', 'single LoRA', 'hub of 2']
    """
    plain = replace(config, hub=1, denoising_power=0.0, student_every=0)
    rungs = [
        ("scales, biases and norms alone", replace(plain, rates=replace(plain.rates, adapters=0))),
        ("single LoRA", plain),
        (f"hub of {config.hub}", replace(plain, hub=config.hub)),
        ("denoising factors", replace(config, student_every=0)),
    ]
    kept: list[tuple[str, FinetuneConfig]] = []
    for name, rung in rungs:
        if trains(rung) and rung != config and rung not in [other for _, other in kept]:
            kept.append((name, rung))
    return kept


def check_same_sampler(full: DiffusionPipeline, quantized: DiffusionPipeline) -> None:
    """Raise InputError unless two pipelines have one scheduler."""
    one, other = full.scheduler, quantized.scheduler
    if type(one) is not type(other):
        raise InputError(
            f"the teacher's sampler must be that of the quantized pipeline, "
            f"{type(other).__name__}, not {type(one).__name__}: choose one for both"
        )
    for key, value in one.config.items():
        if not key.startswith("_") and other.config.get(key) != value:
            raise InputError(
                f"the teacher's sampler must be that of the quantized pipeline: {key} is "
                f"{value!r}, not {other.config.get(key)!r}"
            )


def _with_own_denoiser(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return a pipeline of the same components but for the denoiser, which is copied."""
    denoiser = denoiser_of(pipe)
    shared = {id(part): part for part in vars(pipe).values() if part is not denoiser}
    return copy.deepcopy(pipe, shared)
