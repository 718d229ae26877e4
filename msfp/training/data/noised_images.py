"""Trajectories from data: noised images replace the samples of a sampler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from msfp.errors import InputError
from msfp.layers.lora.routers import TRAINING_TIMESTEPS
from msfp.pipelines.denoiser import denoiser_of, scheduler_of, timestep_of
from msfp.pipelines.recording import Recording
from msfp.pipelines.sampler import PipelineCall, check_calls
from msfp.pipelines.trajectories import Trajectories
from msfp.support.checks import check_seed, check_type
from msfp.support.hooks import hooked
from msfp.support.progress import Progress, counted, shown_progress

OFF_GRID = 4e-3
"""Largest relative difference of a timestep from the scheduler's: the rounding of bfloat16."""


def data_trajectories(
    model: DiffusionPipeline,
    *,
    calls: PipelineCall | Sequence[PipelineCall],
    images: torch.Tensor,
    seed: int = 0,
    progress: Progress = shown_progress,
) -> Trajectories:
    """Record calls of a pipeline with noised images instead of its own samples.

    Timesteps, prompts, labels and guidance are those of the calls. At each step, the input of the
    denoiser is replaced by images with the noise of that step, which the pipeline's scheduler adds.
    The predictions are recorded as by `record_trajectories`.

    Args:
        model: A full-precision pipeline; its scheduler adds the noise.
        calls: As for `record_trajectories`. `images[i]` replaces image i of the calls. After the
            last image the first follows, with other noise.
        images: Clean images or latents, in the form that the denoiser predicts. They have the
            shape of its input, mostly (count, channels, height, width), and the range of its
            training data, which is -1 to 1 for pixels.
        seed: Seed of the noise. The noise of an image depends only on the seed and its index.
        progress: As for `record_trajectories`.

    Returns:
        The trajectories, to train on or to hold out. With guidance, the guidance branches of an
        image have equal noise, as in a sampler.

    Raises:
        InputError: If the pipeline has no denoiser or its scheduler cannot add noise, the images
            are not finite or do not have the shape of the denoiser's input, a call uses timesteps
            that are not the scheduler's, or as `record_trajectories` does.

    Example:
        >>> from msfp import Sampler, reference_pipeline
        >>> calls, images = Sampler(steps=2, batch=4).calls(8, seed=0), torch.zeros(3, 1, 16, 16)
        >>> paths = data_trajectories(reference_pipeline(), calls=calls, images=images)
        >>> paths.timesteps.tolist(), tuple(paths.samples.shape)
        ([999, 499], (2, 8, 1, 16, 16))
    """
    _check(model, images)
    check_seed(seed)
    given = check_calls("calls", calls)
    noising = _Noising(model, images, seed)
    recording = Recording([noising.during(call) for call in given])
    done = counted(progress, "recording", len(given))
    with hooked([denoiser_of(model).register_forward_pre_hook(noising, with_kwargs=True)]):
        for call in recording.calls:
            call(model)
            done(1)
    return recording.trajectories(model)


def noised(
    scheduler: SchedulerMixin, images: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Return noised images in the form of a denoiser's input at a timestep.

    Args:
        scheduler: A scheduler with timesteps; it is not changed.
        images: Clean images.
        noise: Noise with the shape of the images.
        timestep: One of the scheduler's, shape ().

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> scheduler = FlowMatchEulerDiscreteScheduler()
        >>> scheduler.set_timesteps(sigmas=[1.0, 0.25])
        >>> images, noise = torch.full((1, 2), 4.0), torch.zeros(1, 2)
        >>> noised(scheduler, images, noise, scheduler.timesteps[1])
        tensor([[3., 3.]])
    """
    own = copy.copy(scheduler)
    for name in ("_step_index", "_begin_index"):  # the scheduler prefers these to the timestep
        if hasattr(own, name):
            setattr(own, name, None)
    times = timestep.reshape(1)
    if hasattr(own, "scale_noise"):
        sample = own.scale_noise(images, times, noise)
    else:
        sample = own.add_noise(images, noise, times)
    if hasattr(own, "scale_model_input"):
        sample = own.scale_model_input(sample, timestep)
    result: torch.Tensor = sample
    return result


class _Noising:
    """Forward pre-hook of a pipeline's denoiser that replaces its samples by noised images.

    Args:
        pipe: The pipeline.
        images: Clean images.
        seed: Seed of the noise.
    """

    def __init__(self, pipe: DiffusionPipeline, images: torch.Tensor, seed: int) -> None:
        self.pipe, self.images, self.seed = pipe, images, seed
        self.start, self.count = 0, 0
        self._forget()

    def _forget(self) -> None:
        """Begin a new call, with the images after those of the last call."""
        self.start += self.count
        self.count, self.copies, self.scale = 0, 1, 1.0
        self.draws: list[torch.Generator] = []
        self.noise: dict[float, torch.Tensor] = {}

    def during(self, call: PipelineCall) -> PipelineCall:
        """Return a call that uses the next images."""

        def make(pipe: DiffusionPipeline | nn.Module) -> None:
            self._forget()
            call(pipe)

        return make

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of a forward pass, with noised images in place of its samples."""
        bound = inspect.signature(denoiser.forward).bind(*args, **kwargs)
        name = next(iter(bound.arguments))
        sample = bound.arguments[name]
        time = timestep_of(denoiser, args, kwargs)[0].item()
        if not self.count:
            self._begin(sample, time)
        timestep = self._on_grid(time)
        places = range(self.start, self.start + self.count)
        chosen = self.images[[place % len(self.images) for place in places]]
        chosen = chosen.to(sample.device, torch.float32)
        noise = self._noise(timestep.item()).to(sample.device)
        read = noised(scheduler_of(self.pipe), chosen, noise, timestep)
        repeats = (self.copies, *(1,) * (sample.dim() - 1))
        bound.arguments[name] = read.to(sample.dtype).repeat(repeats)
        return bound.args, bound.kwargs

    def _begin(self, sample: torch.Tensor, time: float) -> None:
        """Detect the form of samples and timesteps from the first forward pass of a call."""
        shape, wanted = tuple(self.images.shape[1:]), tuple(sample.shape[1:])
        if shape != wanted:
            raise InputError(f"images must have the shape {wanted} each, not {shape}")
        self.copies = _copies(sample)
        self.count = len(sample) // self.copies
        # Flow models receive times from 0 to 1.
        of_one = time <= 1 < scheduler_of(self.pipe).timesteps.max().item()
        self.scale = float(TRAINING_TIMESTEPS) if of_one else 1.0
        self.draws = [
            torch.Generator().manual_seed(self.seed * 1_000_003 + self.start + place)
            for place in range(self.count)
        ]

    def _on_grid(self, time: float) -> torch.Tensor:
        """Return the scheduler's timestep for a time that the denoiser received."""
        timesteps = scheduler_of(self.pipe).timesteps
        distances = (timesteps.double() - self.scale * time).abs()
        nearest = distances.argmin()
        if distances[nearest] > OFF_GRID * timesteps[nearest].abs():
            raise InputError(
                f"calls must take the denoiser along the timesteps of the pipeline's scheduler, "
                f"but {time} is not one of them"
            )
        found: torch.Tensor = timesteps[nearest]
        return found

    def _noise(self, time: float) -> torch.Tensor:
        """Return the noise of each image at a timestep, the same when it is visited again."""
        if time not in self.noise:
            shape = self.images.shape[1:]
            drawn = [torch.randn(shape, generator=draw) for draw in self.draws]
            self.noise[time] = torch.stack(drawn)
        return self.noise[time]


def _copies(sample: torch.Tensor) -> int:
    """Return how often the rows of a sample are repeated, as for guidance branches."""
    for copies in range(len(sample), 1, -1):
        if len(sample) % copies == 0:
            first = sample[: len(sample) // copies]
            if torch.equal(sample, first.repeat(copies, *(1,) * (sample.dim() - 1))):
                return copies
    return 1


def _check(pipe: DiffusionPipeline, images: torch.Tensor) -> None:
    """Raise InputError unless images can be noised for a pipeline."""
    check_type("model", pipe, DiffusionPipeline)
    scheduler = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "add_noise") and not hasattr(scheduler, "scale_noise"):
        raise InputError(
            f"model must have a scheduler that can add noise; that of {type(pipe).__name__} is "
            f"{'missing' if scheduler is None else type(scheduler).__name__}"
        )
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        raise InputError("images must be a floating-point tensor, in the denoiser's own range")
    if images.dim() < 2 or not images.numel():
        raise InputError(
            f"images must have the shape (count, ...) with a count of 1 or more, not "
            f"{tuple(images.shape)}"
        )
    if not images.isfinite().all():
        raise InputError("images must be finite")
