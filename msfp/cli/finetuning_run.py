"""From a packed pipeline and its full-precision one to a fine-tuned one, and what that brought."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from msfp.errors import InputError
from msfp.evaluation.comparison import check_pair
from msfp.evaluation.prediction_errors import noise_errors
from msfp.evaluation.whole_sets import paired_psnr
from msfp.layers.lora.talora import precompute_routing, routing_of
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.recording import record_trajectories
from msfp.pipelines.sampler import Sampler
from msfp.pipelines.trajectories import Trajectories
from msfp.reports.finetuning_page import SHOWN, FinetuningReport, Row
from msfp.schedulers.denoising_factors import denoising_factors
from msfp.support.progress import Progress, no_progress, of_part
from msfp.training.config import FinetuneConfig
from msfp.training.data.clean_images import chosen_files, clean_images
from msfp.training.data.first_call import first_call
from msfp.training.data.noised_images import data_trajectories
from msfp.training.finetuning import check_checkpointing, finetune
from msfp.training.guidance import guidance_branches
from msfp.training.objective import loss_weights
from msfp.training.state import History
from msfp.training.unpacking import check_unpacking, unpack

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


class FinetuningRun:
    """Fine-tunes one packed pipeline, perhaps in several ways.

    Args:
        original: The full-precision pipeline.
        quantized: The packed one, as loaded; it is not changed.
        sampler: How both are called.
        extent: How much is recorded.
        config: What is to be trained, to be refused before anything is recorded.
        data: A folder of images, to train on them, noised, and not on the sampler's own samples.
        progress: Told of each stage.

    Raises:
        InputError: If the pipelines are of different models or samplers, the packed one cannot be
            trained, or not by the config, or the data cannot be read.
    """

    def __init__(
        self,
        original: DiffusionPipeline,
        quantized: DiffusionPipeline,
        sampler: Sampler,
        extent: Extent,
        config: FinetuneConfig | None = None,
        data: Path | None = None,
        progress: Progress = no_progress,
    ) -> None:
        check_pair(denoiser_of(original), denoiser_of(quantized))
        check_same_sampler(original, quantized)
        check_unpacking(denoiser_of(quantized), denoiser_of(original))
        self.original, self.quantized, self.sampler = original, quantized, sampler
        self.extent, self.data, self.progress = extent, data, progress
        scheduler, self.rows_at_once = first_call(original, sampler.calls(1, extent.seed)[0])
        factors, unknown = _factors(scheduler)
        power = 0.0
        if config is not None:
            power = config.dfa_power
            check_checkpointing(denoiser_of(quantized), config)
            _check_rates(config)
            _check_power(power, unknown)
        self.branches, self.branch_rows = guidance_branches(original, sampler, self.rows_at_once)
        self.path = self._path() if data is None else self._path_of(data)
        self.factors, unknown = _recorded_factors(scheduler, factors, self.path.timesteps, unknown)
        _check_power(power, unknown)
        self.held_out = self._recorded("held-out", extent.held_out, extent.seed + 1)
        self.images = self._sampled("full precision", original)

    def _path(self) -> Trajectories:
        return self._recorded("trajectories", self.extent.trajectories, self.extent.seed)

    def _path_of(self, data: Path) -> Trajectories:
        """Return the trajectories of noised images."""
        seed = self.extent.seed
        calls = self.sampler.calls(self.extent.trajectories, seed)
        places = len(calls) * self.sampler.batch  # the last call is a whole batch as well
        files = chosen_files(data, places, len(self.sampler.conditions))
        images = clean_images(self.original, files, self.progress)
        return data_trajectories(
            self.original, calls=calls, images=images, seed=seed,
            progress=of_part(self.progress, "noised images"),
        )  # fmt: skip

    def _recorded(self, part: str, count: int, seed: int) -> Trajectories:
        calls = self.sampler.calls(count, seed)
        progress = of_part(self.progress, part)
        return record_trajectories(self.original, calls=calls, progress=progress)

    def _sampled(self, name: str, pipe: DiffusionPipeline) -> torch.Tensor:
        count = min(MEASURED_IMAGES, self.extent.held_out)
        return self.sampler(
            pipe, count, self.extent.seed + 2, progress=of_part(self.progress, name)
        )

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
        errors = noise_errors(pipe, trajectories=self.held_out, batch=self.rows_at_once)
        moved = None
        if self.factors is not None:
            timesteps = self.held_out.timesteps
            weights = loss_weights(timesteps, self.factors, 2.0, "none").tolist()
            moved = [error * weight for error, weight in zip(errors, weights, strict=True)]
        psnr = paired_psnr(images, self.images)
        return Row(name, errors, moved, psnr, images[:SHOWN], minutes, best)

    def finetuned(
        self,
        config: FinetuneConfig,
        *,
        state: Path | None = None,
        resume: bool = False,
        tensorboard: Path | None = None,
        progress: Progress = no_progress,
    ) -> tuple[DiffusionPipeline, History, float]:
        """Fine-tune a copy of the packed pipeline; return it, what was measured, and the seconds.

        Args:
            config: What is trained and how; its branches are those of the pipeline's guidance.
            state: As for `finetune`.
            resume: As for `finetune`.
            tensorboard: As for `finetune`.
            progress: As for `finetune`.
        """
        pipe = _with_own_denoiser(self.quantized)
        original = denoiser_of(self.original)
        unpack(pipe, original=original)
        started = time.monotonic()
        device = next(original.parameters()).device
        if config.shard:  # a whole one beside the parts would be in their way
            original.to("cpu")
        history = finetune(
            pipe,
            replace(config, guidance_branches=self.branches, guidance_rows=self.branch_rows),
            trajectories=self.path,
            factors=self.factors,
            held_out=self.held_out,
            original=original,
            state=state,
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
            "sampler": type(self.original.scheduler).__name__,
            "sampler_steps": self.sampler.steps,
            "sampler_batch": self.sampler.batch,
            "guidance_scale": self.sampler.guidance_scale,
            "count": self.extent.trajectories,
            "held_out": self.extent.held_out,
            "seed": self.extent.seed,
            "dtype": str(self.original.dtype).removeprefix("torch."),
            **({} if self.data is None else {"data": str(self.data)}),
            **({kind: list(self.sampler.conditions)} if self.sampler.conditions else {}),
        }

    def report(
        self, title: str, names: dict[str, str], config: FinetuneConfig, rows: list[Row],
        history: History, pipe: DiffusionPipeline,
    ) -> FinetuningReport:  # fmt: skip
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
        return FinetuningReport(
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
        factors = {time: factors[own] for time, own in zip(given, grid, strict=True)}
    try:
        loss_weights(recorded, factors, 1.0)
    except InputError:
        return (
            None,
            f"the denoiser is given the timesteps {given}, not the sampler's {list(factors)}",
        )
    return factors, ""


def _check_power(power: float, unknown: str) -> None:
    """Raise InputError if factors are wanted, and are not known for a reason."""
    if power > 0 and unknown:
        raise InputError(f"dfa_power must be 0, not {power}: {unknown}")


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
    routing = routing_of(denoiser_of(pipe))
    if routing is None:
        return None
    precompute_routing(pipe, timesteps=timesteps)
    winners = [routing.table[timestep.item()] for timestep in timesteps]
    return torch.cat(winners).T


def ablation(config: FinetuneConfig) -> list[tuple[str, FinetuneConfig]]:
    """Return what a config is made of, one ingredient after the other, without the config itself.

    Example:
        >>> [name for name, _ in ablation(FinetuneConfig(hub=2, dfa_power=1.0))]
        ['scales, biases and norms alone', 'single LoRA', 'hub of 2']
    """
    plain = replace(config, hub=1, dfa_power=0.0)
    parts = [
        ("scales, biases and norms alone", replace(plain, rates=replace(plain.rates, adapters=0))),
        ("single LoRA", plain),
        (f"hub of {config.hub}", replace(plain, hub=config.hub)),
    ]
    kept: list[tuple[str, FinetuneConfig]] = []
    for name, part in parts:
        if trains(part) and part != config and part not in [other for _, other in kept]:
            kept.append((name, part))
    return kept


def check_same_sampler(original: DiffusionPipeline, quantized: DiffusionPipeline) -> None:
    """Raise InputError unless two pipelines have one scheduler."""
    one, other = original.scheduler, quantized.scheduler
    if type(one) is not type(other):
        raise InputError(
            f"the sampler of the original must be that of the quantized pipeline, "
            f"{type(other).__name__}, not {type(one).__name__}: choose one for both"
        )
    for key, value in one.config.items():
        if not key.startswith("_") and other.config.get(key) != value:
            raise InputError(
                f"the sampler of the original must be that of the quantized pipeline: {key} is "
                f"{value!r}, not {other.config.get(key)!r}"
            )


def _with_own_denoiser(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return a pipeline of the same components but for the denoiser, which is copied."""
    denoiser = denoiser_of(pipe)
    shared = {id(part): part for part in vars(pipe).values() if part is not denoiser}
    return copy.deepcopy(pipe, shared)
