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
"""A function that does something with a pipeline, or with a bare denoiser."""
CONDITION_TYPES: dict[str, type] = {"prompt": str, "class_labels": int}
"""Arguments of pipeline calls that say what images show, and the type of each image's."""
MOST_STEPS, MOST_IMAGES = 10**6, 10**9
MOST_SEED = 2**42
"""Of noise: each image of a seed has one of its own, which generators of torch must take."""
SAFETY_CHECKER = "safety_checker"
"""The component of pipelines that makes images black which it takes for unsafe."""

FLOAT32 = (torch.float32,)
NO_BFLOAT16 = (torch.float32, torch.float16)
PIPELINE_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    # Their noise is float32, whatever the network is.
    "LDMPipeline": FLOAT32,
    "PNDMPipeline": FLOAT32,
    # Their images become arrays of NumPy, which has no bfloat16.
    "DDPMPipeline": NO_BFLOAT16,
    "DDIMPipeline": NO_BFLOAT16,
    "DiTPipeline": NO_BFLOAT16,
}
"""The dtypes that pipelines of diffusers can sample in, where these are not all."""


@dataclass(frozen=True)
class Sampler:
    """A pipeline call with fixed step count, batch size and conditions.

    The noise of image i depends on the seed and the batch size alone, so two models sampled alike
    start from equal noise. A safety checker that the pipeline has is not run: images that it makes
    black could not be compared.

    Attributes:
        steps: Sampler steps.
        batch: Images in one call of the pipeline.
        conditions: Prompts, or class labels, for a pipeline that takes those. Image i has the
            condition i; after the last one the first is next.
        guidance_scale: Of classifier-free guidance, or None for the pipeline's default.

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
            pipe: What to call.
            count: Images in all.
            seed: Of their noise.
            progress: Told of each batch.

        Raises:
            InputError: If the pipeline takes other conditions or no guidance scale, or cannot
                sample in its dtype, or the count or the seed is out of range.
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
        """Yield the same images batch by batch, of which one is held at a time.

        Args:
            pipe: What to call.
            count: Images in all.
            seed: Of their noise.
            done: Images of whole batches that are left out at the beginning.

        Raises:
            InputError: As a call.
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
        """Return the images from number `start` on, one batch of them.

        Raises:
            InputError: As a call.
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
        """Return the arguments of a call that say what the images from number `start` on show.

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
    """Raise InputError unless so many images can be sampled from the noise of a seed."""
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
    """Return a call, or several, as a list.

    Args:
        name: What to call the argument.
        calls: What is given.
        others: What else the argument may be, as it is to be said after "functions".

    Raises:
        InputError: If that is something else, or none.
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
    """Return the argument of a pipeline's call that takes its conditions, or else their number."""
    parameters = inspect.signature(pipe.__call__).parameters
    return next((name for name in (*CONDITION_TYPES, "batch_size") if name in parameters), None)


@contextmanager
def unchecked(pipe: DiffusionPipeline) -> Iterator[None]:
    """Keep the safety checker of a pipeline, where it has one, from running inside the block."""
    parts = vars(pipe)
    checker = parts.get(SAFETY_CHECKER)
    if checker is None:
        yield
        return
    # Not by setting the attribute, from which the pipeline's config would forget the class.
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
    """Raise InputError unless conditions are what the call of a pipeline takes.

    Args:
        kind: The class of the pipeline.
        conditions: What is given.
        taken: The argument that takes them, or "batch_size" where none does.
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
        conditions: Prompts, or class labels for a pipeline that takes those.
        steps: Sampler steps.
        seed: Seed of the noise of the first call; each next one has the next.
        **arguments: More arguments of the call, such as `guidance_scale` and `height`.

    Raises:
        InputError: If there is no condition, or one string in place of a list of them, or some are
            prompts and some labels, or another value is out of range. A call itself raises it
            where the pipeline takes other conditions.

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
