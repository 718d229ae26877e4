"""The state of a pipeline when it calls its denoiser for the first time."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any, NamedTuple, NoReturn

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from msfp.pipelines.denoiser import denoiser_of, scheduler_of
from msfp.pipelines.sampler import PipelineCall
from msfp.support.hooks import hooked


class FirstCall(NamedTuple):
    """The state of a pipeline before the first forward pass of its denoiser.

    Attributes:
        scheduler: A copy of the scheduler, with the pipeline's timesteps, before the first step.
        rows: Number of samples in the input of the denoiser.
    """

    scheduler: SchedulerMixin
    rows: int


class _CalledError(Exception):
    """Stops a call of a pipeline before the first forward pass of its denoiser."""


def first_call(pipe: DiffusionPipeline, call: PipelineCall) -> FirstCall:
    """Run a call of a pipeline until its denoiser would run for the first time.

    Pipelines pass their own timesteps, sigmas and shifts to their schedulers. `set_timesteps` with
    only a number of steps does not reproduce them.

    Args:
        pipe: The pipeline. Its state changes as in any call.
        call: A call, for example one that `Sampler.calls` returns.

    Example:
        >>> from msfp import Sampler, reference_pipeline
        >>> pipe = reference_pipeline()
        >>> scheduler, rows = first_call(pipe, Sampler(2, batch=4).calls(4, seed=0)[0])
        >>> scheduler.timesteps.tolist(), rows
        ([999, 499], 4)
    """
    found: list[FirstCall] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        sample = given[next(iter(given))]
        found.append(FirstCall(copy.deepcopy(scheduler_of(pipe)), len(sample)))
        raise _CalledError

    hook = denoiser_of(pipe).register_forward_pre_hook(stop, with_kwargs=True)
    with hooked([hook]), contextlib.suppress(_CalledError):
        call(pipe)
    return found[0]
