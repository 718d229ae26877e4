"""The arguments of a pipeline's call: conditions, noise and others, by what the pipeline takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from msfp.errors import InputError

CONDITION_TYPES: dict[str, type] = {"prompt": str, "class_labels": int}
"""Names of the condition arguments of pipeline calls, and the type of each condition."""
COUNTS = (
    "batch_size", "num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt",
)  # fmt: skip
"""Names of the number of images, of calls without a list of conditions."""
STEPS = "num_inference_steps"
"""Name of the number of steps; cascades have one for each stage, which ends so."""
SAFETY_CHECKER = "safety_checker"
"""The pipeline component that replaces images by black ones if it considers them unsafe."""


@dataclass(frozen=True)
class CallSettings:
    """What a call of a pipeline is to be given.

    Attributes:
        conditions: Prompts or class labels, one for each image, or none.
        count: Number of images.
        steps: Sampler steps.
        seed: Seed of the noise.
        output_type: The form of the result, such as "np".
        extra: Further arguments of the call by name, as they are.
    """

    conditions: Sequence[str | int]
    count: int
    steps: int
    seed: int
    output_type: str
    extra: Mapping[str, Any] = field(default_factory=dict)


def call_arguments(pipe: DiffusionPipeline, settings: CallSettings) -> dict[str, Any]:
    """Return the keyword arguments of a pipeline's call.

    Raises:
        InputError: If the pipeline does not take an argument, takes other conditions, or cannot
            make several images at once.
    """
    names = inspect.signature(pipe.__call__).parameters
    check_extra(pipe, settings.extra)
    given = condition_arguments(pipe, settings.conditions, settings.count, settings.extra)
    if "generator" in names:
        given["generator"] = torch.Generator().manual_seed(settings.seed)
    if "output_type" in names and knows(pipe, settings.output_type):
        given["output_type"] = settings.output_type
    given |= {name: settings.steps for name in names if name.endswith(STEPS)}
    return given | dict(settings.extra)


def called(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> Any:
    """Call a pipeline with keyword arguments, without its safety checker; return the result.

    Raises:
        InputError: If the pipeline refuses an argument.
    """
    try:
        with unchecked(pipe):
            return pipe(**arguments)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{type(pipe).__name__} cannot be called so: {line}") from error


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


def condition_arguments(
    pipe: DiffusionPipeline,
    conditions: Sequence[str | int],
    count: int,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments with the conditions, or else with the number of images.

    Raises:
        InputError: If the pipeline takes other conditions, or cannot make several images at once.
    """
    taken, kind = condition_argument(pipe), type(pipe).__name__
    if conditions or not extra:
        check_conditions(kind, conditions, taken)
    names = inspect.signature(pipe.__call__).parameters
    if conditions and taken is not None:
        single = count == 1 and CONDITION_TYPES[taken] is str
        given: dict[str, Any] = {taken: conditions[0] if single else list(conditions)}
        return given | ({"batch_size": count} if "batch_size" in names else {})
    counts = [name for name in COUNTS if name in names]
    if count > 1 and not counts:
        raise InputError(f"batch must be 1, not {count}: {kind} makes one image in a call")
    return {counts[0]: count} if counts else {}


def condition_argument(pipe: DiffusionPipeline) -> str | None:
    """Return the name of the argument of a pipeline for conditions, or None if it has none."""
    parameters = inspect.signature(pipe.__call__).parameters
    return next((name for name in CONDITION_TYPES if name in parameters), None)


def check_conditions(kind: str, conditions: Sequence[str | int], taken: str | None) -> None:
    """Raise InputError unless a pipeline takes these conditions.

    Args:
        kind: Name of the pipeline's class.
        conditions: The conditions.
        taken: Name of the argument for conditions, or None for an unconditional pipeline.
    """
    wanted = None if taken is None else CONDITION_TYPES[taken]
    if wanted is None and conditions:
        raise InputError(f"{kind} is unconditional: prompts and labels must not be given")
    if wanted is not None:
        name = "prompts" if wanted is str else "labels"
        if not conditions:
            raise InputError(f"{kind} is conditional: {name} must be given")
        if not all(isinstance(each, wanted) for each in conditions):
            raise InputError(f"{kind} takes {name}, not {conditions[0]!r}")


def check_extra(pipe: DiffusionPipeline, extra: Mapping[str, Any]) -> None:
    """Raise InputError unless a pipeline's call takes these arguments."""
    parameters = inspect.signature(pipe.__call__).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return
    for name in extra:
        if name not in parameters:
            raise InputError(
                f"{name} must not be given: {type(pipe).__name__} takes {', '.join(parameters)}"
            )


def knows(pipe: DiffusionPipeline, output_type: str) -> bool:
    """Return whether a pipeline can give its result in a form.

    Every pipeline that takes the argument knows "np". A pipeline that knows "latent" compares the
    argument with it, and one that does not may raise an error after all its steps.
    """
    if output_type == "np":
        return True
    source = inspect.getsource(inspect.unwrap(type(pipe).__call__))
    return f'"{output_type}"' in source
