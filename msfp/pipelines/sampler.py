"""Running a pipeline from seeded noise."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from msfp.errors import InputError
from msfp.pipelines.arguments import (
    CallSettings,
    call_arguments,
    called,
    check_extra,
    condition_arguments,
)
from msfp.pipelines.outputs import as_images
from msfp.support.checks import MAX_SEED, MIN_SEED, check_number, check_whole
from msfp.support.fingerprints import described
from msfp.support.progress import Progress, counted, no_progress

PipelineCall = Callable[[Any], object]
"""A function that runs a pipeline, or a denoiser without a pipeline."""
MOST_STEPS, MOST_IMAGES = 10**6, 10**9
MOST_SEED = 2**42
"""Largest seed of the noise, so that torch accepts the seeds of batches derived from it."""

FLOAT32 = (torch.float32,)
NO_BFLOAT16 = (torch.float32, torch.float16)
PIPELINE_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    # Their noise is always float32, even with another dtype of the network.
    "LDMPipeline": FLOAT32,
    "PNDMPipeline": FLOAT32,
    # Their images are converted to NumPy, which has no bfloat16.
    "DDPMPipeline": NO_BFLOAT16,
    "DDIMPipeline": NO_BFLOAT16,
    "DiTPipeline": NO_BFLOAT16,
}
"""Dtypes in which a diffusers pipeline can sample; pipelines not listed can use any dtype."""


@dataclass(frozen=True)
class Sampler:
    """A pipeline call with a fixed number of steps, batch size and conditions.

    The noise of image i depends only on the seed and the batch size, so two models sampled with the
    same settings start from the same noise. The pipeline's safety checker is not run, because it
    replaces images by black ones, which cannot be compared.

    Attributes:
        steps: Sampler steps.
        batch: Images in one call of the pipeline.
        conditions: Prompts or class labels, whichever the pipeline takes. Image i has condition i.
            If there are more images than conditions, the conditions repeat.
        guidance_scale: Scale of classifier-free guidance, or None for the pipeline's default.
        extra: Further arguments of the call by name, such as an `image` and a `strength`.

    Raises:
        InputError: If a value is out of range or of another type.
    """

    steps: int = 20
    batch: int = 64
    conditions: tuple[str, ...] | tuple[int, ...] = ()
    guidance_scale: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1, MOST_STEPS)
        check_whole("batch", self.batch, 1, MOST_IMAGES)
        object.__setattr__(self, "conditions", _listed(self.conditions))
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale, -1e6, 1e6)
        if not isinstance(self.extra, Mapping):
            raise InputError(f"extra must be a table of arguments by name, not {self.extra!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types; images and tensors by their size and a digest.

        Example:
            >>> Sampler(steps=2, batch=4, extra={"strength": 0.5}).to_dict()
            {'steps': 2, 'batch': 4, 'conditions': [], 'guidance_scale': None,
             'extra': {'strength': 0.5}}
        """
        fields = {**vars(self), "conditions": list(self.conditions)}
        if not self.extra:
            del fields["extra"]
        return {name: described(value) for name, value in fields.items()}

    def __call__(
        self,
        pipe: DiffusionPipeline,
        count: int,
        seed: int,
        *,
        progress: Progress = no_progress,
    ) -> torch.Tensor:
        """Return `count` images of shape (count, channels, height, width) in [0, 1], float32.

        Args:
            pipe: The pipeline.
            count: Number of images.
            seed: Seed of their noise.
            progress: Called after each batch.

        Raises:
            InputError: If the pipeline takes other conditions or no guidance scale, the pipeline
                cannot sample in its dtype, or the count or the seed is out of range.
        """
        images = []
        finished = counted(progress, "sampling", count)
        for some in self.batches(pipe, count, seed):
            images.append(some)
            finished(len(some))
        return torch.cat(images)

    def batches(
        self, pipe: DiffusionPipeline, count: int, seed: int, done: int = 0
    ) -> Iterator[torch.Tensor]:
        """Yield the same images batch by batch, with one batch in memory at a time.

        Args:
            pipe: The pipeline.
            count: Number of images.
            seed: Seed of their noise.
            done: Number of images to skip at the beginning, a multiple of the batch size.

        Raises:
            InputError: For the same reasons as a call of the sampler.
        """
        _check_images(count, seed)
        for start in range(done, count, self.batch):
            yield self.one_batch(pipe, seed, start)[: count - start]

    def calls(self, count: int, seed: int) -> list[PipelineCall]:
        """Return the calls that sample `count` images, one for each batch.

        Raises:
            InputError: If the count or the seed is out of range.

        Example:
            >>> len(Sampler(steps=20, batch=8).calls(20, seed=0))
            3
        """
        _check_images(count, seed)
        starts = range(0, count, self.batch)
        return [partial(self._called, seed=seed, start=start) for start in starts]

    def one_batch(self, pipe: DiffusionPipeline, seed: int, start: int) -> torch.Tensor:
        """Return one batch of images, beginning with image number `start`.

        Raises:
            InputError: For the same reasons as a call of the sampler.
        """
        return as_images(self._called(pipe, seed, start))

    def _called(self, pipe: DiffusionPipeline, seed: int, start: int) -> Any:
        """Return the result of a call of a pipeline, which may be no images."""
        check_whole("seed", seed, -MOST_SEED, MOST_SEED)
        settings = CallSettings(
            conditions=self._conditions(start),
            count=self.batch,
            steps=self.steps,
            seed=seed * 1_000_003 + start,
            output_type="np",
            extra=self._extra(pipe),
        )
        given = call_arguments(pipe, settings)
        check_dtype(pipe, getattr(pipe, "dtype", torch.float32))
        return called(pipe, given)

    def arguments(self, pipe: DiffusionPipeline, start: int = 0) -> dict[str, Any]:
        """Return the arguments of the call for the batch beginning with image `start`.

        Those are left out that every call has: the steps, the noise and the form of the result.

        Raises:
            InputError: If the pipeline takes other conditions, no guidance scale, or another
                argument not.
        """
        extra = self._extra(pipe)
        check_extra(pipe, extra)
        given = condition_arguments(pipe, self._conditions(start), self.batch, self.extra)
        return given | extra

    def _conditions(self, start: int) -> list[str | int]:
        """Return the conditions of the batch beginning with image `start`."""
        images = range(start, start + self.batch) if self.conditions else ()
        return [self.conditions[i % len(self.conditions)] for i in images]

    def _extra(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Return the further arguments, with the guidance scale."""
        if self.guidance_scale is None:
            return dict(self.extra)
        if "guidance_scale" not in inspect.signature(pipe.__call__).parameters:
            raise InputError(f"guidance_scale must not be given: {type(pipe).__name__} takes none")
        return {**self.extra, "guidance_scale": self.guidance_scale}


def _check_images(count: int, seed: int) -> None:
    """Raise InputError unless a number of images and a seed are in range."""
    check_whole("count", count, 1, MOST_IMAGES)
    check_whole("seed", seed, -MOST_SEED, MOST_SEED)


def _listed(conditions: Any) -> tuple[str, ...] | tuple[int, ...]:
    """Return conditions as a tuple; raise InputError unless they are all prompts or all labels."""
    listed = isinstance(conditions, Iterable) and not isinstance(conditions, str)
    given = tuple(conditions) if listed else (None,)
    if not any(all(isinstance(each, kind) for each in given) for kind in (str, int)):
        raise InputError(f"conditions must be a list of prompts or labels, not {conditions!r}")
    return given


def check_calls(name: str, calls: Any, others: str = "") -> list[PipelineCall]:
    """Return one or more calls as a list.

    Args:
        name: Name of the argument in error messages.
        calls: One function or several.
        others: Other allowed values of the argument, as text that the error message appends.

    Raises:
        InputError: If the argument is not one or more functions.
    """
    given = [calls] if callable(calls) else calls
    given = list(given) if isinstance(given, Iterable) else [given]
    if not given or not all(callable(each) for each in given):
        shown = reprlib.repr(calls)
        raise InputError(
            f"{name} must be one or more functions of the pipeline{others}, not {shown}"
        )
    return given


def check_dtype(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Raise InputError unless a pipeline can sample in a dtype."""
    kind = type(pipe).__name__
    allowed = PIPELINE_DTYPES.get(kind, (dtype,))
    if dtype not in allowed:
        names = " or ".join(str(each).removeprefix("torch.") for each in allowed)
        given = str(dtype).removeprefix("torch.")
        raise InputError(f"dtype must be {names} for {kind} of diffusers, not {given}")


def prompt_calls(
    conditions: Sequence[str | int] = (),
    *,
    count: int | None = None,
    steps: int = 20,
    seed: int = 0,
    **arguments: Any,
) -> list[PipelineCall]:
    """Return calls of a pipeline, one for each condition.

    Args:
        conditions: Prompts, or class labels for a class-conditional pipeline. None for a pipeline
            that is called with `arguments` alone, such as an image.
        count: Number of calls; the conditions are taken in turn. By default one for each condition,
            or one.
        steps: Sampler steps.
        seed: Seed of the noise of the first call. It increases by 1 with each call.
        **arguments: Further arguments of the call, such as `guidance_scale`, `height` or `image`.

    Raises:
        InputError: If there is neither a condition nor another argument, the conditions are a
            string instead of a list, they mix prompts and labels, or another value is out of range.
            A call raises it if the pipeline takes other conditions or arguments.

    Example:
        >>> calls = prompt_calls(["a fox", "a red bicycle"], steps=20, guidance_scale=5.0)
        >>> len(calls)
        2
    """
    given: Sequence[str | int] = _listed(conditions)
    if not given and not arguments:
        raise InputError(f"conditions must hold at least one prompt or label, not {conditions!r}")
    count = max(1, len(given)) if count is None else count
    check_whole("count", count, 1, MOST_IMAGES)
    check_whole("steps", steps, 1, MOST_STEPS)
    check_whole("seed", seed, MIN_SEED, MAX_SEED - count + 1)

    def call(pipe: DiffusionPipeline, index: int) -> None:
        conditions = [given[index % len(given)]] if given else []
        settings = CallSettings(conditions, 1, steps, seed + index, "latent", arguments)
        called(pipe, call_arguments(pipe, settings))

    return [partial(call, index=index) for index in range(count)]
