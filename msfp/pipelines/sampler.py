"""Running a pipeline from seeded noise."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from msfp.errors import InputError
from msfp.support.checks import MAX_SEED, MIN_SEED, check_number, check_whole
from msfp.support.progress import Progress, counted, no_progress

PipelineCall = Callable[[Any], object]
"""A function that runs a pipeline, or a denoiser without a pipeline."""
CONDITION_TYPES: dict[str, type] = {"prompt": str, "class_labels": int}
"""Names of the condition arguments of pipeline calls, and the type of each condition."""
MOST_STEPS, MOST_IMAGES = 10**6, 10**9
MOST_SEED = 2**42
"""Largest seed of the noise, so that torch accepts the seeds of batches derived from it."""
SAFETY_CHECKER = "safety_checker"
"""The pipeline component that replaces images by black ones if it considers them unsafe."""

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

    Raises:
        InputError: If a value is out of range or of another type.
    """

    steps: int = 20
    batch: int = 64
    conditions: tuple[str, ...] | tuple[int, ...] = ()
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1, MOST_STEPS)
        check_whole("batch", self.batch, 1, MOST_IMAGES)
        object.__setattr__(self, "conditions", _listed(self.conditions))
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale, -1e6, 1e6)

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
        return [
            partial(self.one_batch, seed=seed, start=start) for start in range(0, count, self.batch)
        ]

    def one_batch(self, pipe: DiffusionPipeline, seed: int, start: int) -> torch.Tensor:
        """Return one batch of images, beginning with image number `start`.

        Raises:
            InputError: For the same reasons as a call of the sampler.
        """
        check_whole("seed", seed, -MOST_SEED, MOST_SEED)
        given = self.arguments(pipe, start)
        check_dtype(pipe, getattr(pipe, "dtype", torch.float32))
        with unchecked(pipe):
            output = pipe(
                **given,
                generator=torch.Generator().manual_seed(seed * 1_000_003 + start),
                num_inference_steps=self.steps,
                output_type="np",
            )
        return torch.from_numpy(output.images).permute(0, 3, 1, 2)

    def arguments(self, pipe: DiffusionPipeline, start: int = 0) -> dict[str, Any]:
        """Return the condition arguments of the call for the batch beginning with image `start`.

        Raises:
            InputError: If the pipeline takes other conditions, or no guidance scale.
        """
        taken, kind = condition_argument(pipe), type(pipe).__name__
        if taken is None:
            raise InputError(f"{kind} cannot be sampled: its call must take prompt or batch_size")
        check_conditions(kind, self.conditions, taken)
        given: dict[str, Any] = {taken: self.batch}
        if self.conditions:
            images = range(start, start + self.batch)
            given = {taken: [self.conditions[i % len(self.conditions)] for i in images]}
        if self.guidance_scale is not None:
            if "guidance_scale" not in inspect.signature(pipe.__call__).parameters:
                raise InputError(f"guidance_scale must not be given: {kind} takes none")
            given["guidance_scale"] = self.guidance_scale
        return given


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


def condition_argument(pipe: DiffusionPipeline) -> str | None:
    """Return the name of the argument of a pipeline for conditions, or else for the batch size."""
    parameters = inspect.signature(pipe.__call__).parameters
    return next((name for name in (*CONDITION_TYPES, "batch_size") if name in parameters), None)


@contextmanager
def unchecked(pipe: DiffusionPipeline) -> Iterator[None]:
    """Disable the safety checker of a pipeline, if it has one, inside the block."""
    parts = vars(pipe)
    checker = parts.get(SAFETY_CHECKER)
    if checker is None:
        yield
        return
    # Setting the attribute would also delete the class of the checker from the pipeline's config.
    parts[SAFETY_CHECKER] = None
    try:
        yield
    finally:
        parts[SAFETY_CHECKER] = checker


def check_dtype(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Raise InputError unless a pipeline can sample in a dtype."""
    kind = type(pipe).__name__
    allowed = PIPELINE_DTYPES.get(kind, (dtype,))
    if dtype not in allowed:
        names = " or ".join(str(each).removeprefix("torch.") for each in allowed)
        given = str(dtype).removeprefix("torch.")
        raise InputError(f"dtype must be {names} for {kind} of diffusers, not {given}")


def check_conditions(kind: str, conditions: Sequence[str | int], taken: str) -> None:
    """Raise InputError unless a pipeline takes these conditions.

    Args:
        kind: Name of the pipeline's class.
        conditions: The conditions.
        taken: Name of the argument for conditions, or "batch_size" for an unconditional pipeline.
    """
    wanted = CONDITION_TYPES.get(taken)
    if wanted is None and conditions:
        raise InputError(f"{kind} is unconditional: prompts and labels must not be given")
    if wanted is not None:
        name = "prompts" if wanted is str else "labels"
        if not conditions:
            raise InputError(f"{kind} is conditional: {name} must be given")
        if not all(isinstance(each, wanted) for each in conditions):
            raise InputError(f"{kind} takes {name}, not {conditions[0]!r}")


def prompt_calls(
    conditions: Sequence[str | int], *, steps: int = 20, seed: int = 0, **arguments: Any
) -> list[PipelineCall]:
    """Return calls of a conditional pipeline, one for each condition.

    Args:
        conditions: Prompts, or class labels for a class-conditional pipeline.
        steps: Sampler steps.
        seed: Seed of the noise of the first call. It increases by 1 with each call.
        **arguments: Further arguments of the call, such as `guidance_scale` and `height`.

    Raises:
        InputError: If there is no condition, the conditions are a string instead of a list, they
            mix prompts and labels, or another value is out of range. A call raises it if the
            pipeline takes other conditions.

    Example:
        >>> calls = prompt_calls(["a fox", "a red bicycle"], steps=20, guidance_scale=5.0)
        >>> len(calls)
        2
    """
    given: Sequence[str | int] = _listed(conditions)
    if not given:
        raise InputError(f"conditions must hold at least one prompt or label, not {conditions!r}")
    check_whole("steps", steps, 1, MOST_STEPS)
    check_whole("seed", seed, MIN_SEED, MAX_SEED)

    def call(pipe: DiffusionPipeline, condition: str | int, seed: int) -> None:
        taken = condition_argument(pipe)
        if taken is not None:
            check_conditions(type(pipe).__name__, [condition], taken)
        generator = torch.Generator().manual_seed(seed)
        options = {"output_type": "latent"} | arguments
        pipe([condition], num_inference_steps=steps, generator=generator, **options)

    return [
        partial(call, condition=condition, seed=seed + index)
        for index, condition in enumerate(given)
    ]
