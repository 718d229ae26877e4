"""Fine-tuning a packed pipeline towards its full-precision one, and measuring the result."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from msfp.errors import InputError
from msfp.evaluation.prediction_comparison import check_pair
from msfp.evaluation.prediction_errors import noise_errors
from msfp.evaluation.whole_sets import paired_psnr
from msfp.layers.lora.talora import precompute_routing, routing_of
from msfp.pipelines.denoiser import denoiser_of, scheduler_of
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
    """How many trajectories are recorded.

    Attributes:
        trajectories: Number of images whose trajectories are trained on.
        held_out: Number of images whose trajectories errors are measured on.
        seed: Seed of the noise.
    """

    trajectories: int
    held_out: int
    seed: int


class FinetuningRun:
    """Fine-tunes one packed pipeline, with one config or several.

    Args:
        original: The full-precision pipeline.
        quantized: The packed pipeline, as loaded; it is not changed.
        sampler: How to call both pipelines.
        extent: How many trajectories to record.
        config: A config of the training. It is checked before anything is recorded.
        data: A folder of images to train on, with noise added, instead of the sampler's samples.
        progress: Called with the progress of each stage.

    Raises:
        InputError: If the pipelines have different models or samplers, the packed pipeline cannot
            be trained, the config does not suit it, or the data cannot be read.
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
        self.guidance = guidance_branches(original, sampler, self.rows_at_once)
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
        places = len(calls) * self.sampler.batch  # the last call is a whole batch too
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
        """Measure a pipeline, and return its row of the report.

        Args:
            name: Name of the row.
            pipe: The packed pipeline, or a fine-tuned one.
            minutes: Minutes that its training took.
            best: The training step whose weights were kept, where held-out errors chose it.
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
        """Fine-tune a copy of the packed pipeline; return the copy, its history and the seconds.

        Args:
            config: What is trained and how; the pipeline's guidance branches replace its own.
            state: As for `finetune`.
            resume: As for `finetune`.
            tensorboard: As for `finetune`.
            progress: As for `finetune`.
        """
        pipe = _with_own_denoiser(self.quantized)
        original = denoiser_of(self.original)
        unpack(pipe, original=original)
        started = time.monotonic()
        branches, rows = self.guidance
        device = next(original.parameters()).device
        if config.shard:  # make room on the device for the parts of the sharded weights
            original.to("cpu")
        history = finetune(
            pipe,
            replace(config, guidance_branches=branches, guidance_rows=rows),
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
            "sampler": type(scheduler_of(self.original)).__name__,
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
        """Return the report of a finished run.

        Args:
            title: Heading of the page.
            names: Names of the checkpoint and of the original pipeline.
            config: Config of the training.
            rows: Rows of the table.
            history: History of the training.
            pipe: The fine-tuned pipeline.
        """
        timesteps = self.held_out.timesteps
        return FinetuningReport(
            title, config, timesteps.tolist(), self.images, rows, history,
            routing_table(pipe, timesteps), names | self.facts(),
        )  # fmt: skip


def _factors(scheduler: SchedulerMixin) -> tuple[dict[float, float] | None, str]:
    """Return the denoising factors of a scheduler, ignoring clipping, or None and the reason."""
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
    """Return the factors by the timesteps that the denoiser received, or None and the reason.

    Pipelines may divide the scheduler's timesteps, but keep their order.

    Args:
        scheduler: A scheduler whose timesteps are set.
        factors: The factors by the scheduler's timesteps, or None.
        recorded: The timesteps that the denoiser received.
        unknown: The reason if there are no factors.
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
    """Raise InputError if the loss needs factors and they are unknown."""
    if power > 0 and unknown:
        raise InputError(f"dfa_power must be 0, not {power}: {unknown}")


def _check_rates(config: FinetuneConfig) -> None:
    """Raise InputError unless something is trained."""
    if not trains(config):
        raise InputError(
            "at least one rate must be above 0 (the rate of router counts only if hub is above 1 "
            f"and routing is learned), not {config.rates}"
        )


def trains(config: FinetuneConfig) -> bool:
    """Return whether a config trains anything; the router counts only if there is routing.

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
    """Return the LoRA of each layer (rows) at each timestep (columns), or None without routing."""
    routing = routing_of(denoiser_of(pipe))
    if routing is None:
        return None
    precompute_routing(pipe, timesteps=timesteps)
    winners = [routing.table[timestep.item()] for timestep in timesteps]
    return torch.cat(winners).T


def ablation(config: FinetuneConfig) -> list[tuple[str, FinetuneConfig]]:
    """Return the ablation of a config: simpler configs, each with one more ingredient.

    The config itself is left out.

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
    """Raise InputError unless two pipelines have equal schedulers."""
    for name, one in original.components.items():
        if isinstance(one, SchedulerMixin):
            _check_same(one, quantized.components[name])


def _check_same(one: SchedulerMixin, other: SchedulerMixin) -> None:
    """Raise InputError unless two schedulers are equal."""
    if type(one) is not type(other):
        raise InputError(
            "original and quantized pipelines must have the same sampler, not "
            f"{type(one).__name__} and {type(other).__name__}: set --sampler"
        )
    for key, value in one.config.items():
        if not key.startswith("_") and other.config.get(key) != value:
            raise InputError(
                "original and quantized pipelines must have the same sampler settings, not "
                f"{key}={value!r} and {key}={other.config.get(key)!r}"
            )


def _with_own_denoiser(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return a pipeline with a copy of the denoiser and the same other components."""
    denoiser = denoiser_of(pipe)
    parts = (*pipe.components.values(), *vars(pipe).values())
    # A combined pipeline holds other pipelines, which must hold the same copy.
    kept = [each for each in parts if not isinstance(each, DiffusionPipeline)]
    return copy.deepcopy(pipe, {id(each): each for each in kept if each is not denoiser})
