"""Samplers by name, to use in a pipeline."""

from __future__ import annotations

import functools
import inspect
import json
import types
from pathlib import Path
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
)

from msfp.errors import InputError

SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
}
"""Schedulers and their settings, by the name of the sampler.

All of them start from noise of unit variance and do not scale the denoiser's input. The sampling
loops of all pipelines can therefore use them.
"""


def use_sampler(pipe: DiffusionPipeline, name: str) -> None:
    """Give a pipeline another scheduler of the same noise schedule, in place.

    Args:
        pipe: The pipeline, which is changed in place.
        name: A key of `SAMPLERS`.

    Raises:
        InputError: If there is no such sampler, or it does not support the pipeline's schedule.

    Example:
        >>> from msfp import reference_pipeline
        >>> pipe = reference_pipeline()
        >>> use_sampler(pipe, "dpm++")
        >>> pipe(batch_size=1, num_inference_steps=2, output_type="np").images.shape
        (1, 16, 16, 1)
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, not {name!r}")
    scheduler_class, settings = SAMPLERS[name]
    if scheduler_class not in pipe.scheduler.compatibles:
        raise InputError(f"sampler {name!r} cannot replace {type(pipe.scheduler).__name__}")
    scheduler = scheduler_class.from_config(pipe.scheduler.config, **settings)
    scheduler.step = _tolerant_step(scheduler)
    pipe.scheduler = scheduler


def restore_sampler(pipe: DiffusionPipeline, folder: Path) -> None:
    """Give a newly loaded pipeline the scheduler saved in its folder, in place.

    Pipelines with a fixed scheduler, such as DDIMPipeline, convert the saved scheduler to theirs.

    Args:
        pipe: The pipeline, which is changed in place.
        folder: The folder that the pipeline was loaded from.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return
    name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    for scheduler_class, _ in SAMPLERS.values():
        if scheduler_class.__name__ == name:
            pipe.scheduler = scheduler_class.from_pretrained(file.parent)
            pipe.scheduler.step = _tolerant_step(pipe.scheduler)


def _tolerant_step(scheduler: Any) -> Any:
    """Return a scheduler's step that ignores the arguments of other schedulers.

    Pipelines with a fixed scheduler, such as DDIMPipeline, pass the arguments of that scheduler to
    any scheduler. The step is a bound method, so that a copy of the scheduler steps itself.
    """
    plain = type(scheduler).step
    known = inspect.signature(plain).parameters

    @functools.wraps(plain)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **{key: value for key, value in kwargs.items() if key in known})

    return types.MethodType(step, scheduler)
