"""What a pipeline has set up when it calls its denoiser for the first time."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any, NamedTuple, NoReturn

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.sampler import PipelineCall
from msfp.support.hooks import hooked


class FirstCall(NamedTuple):
    """What is known before the denoiser has computed anything.

    Attributes:
        scheduler: A copy, with the grid that the pipeline set and no step taken.
        rows: Samples that the denoiser is given at once.
    """

    scheduler: SchedulerMixin
    rows: int


class _CalledError(Exception):
    """Ends a call of a pipeline where the denoiser would begin."""


def first_call(pipe: DiffusionPipeline, call: PipelineCall) -> FirstCall:
    """Make a call of a pipeline up to the first forward of its denoiser, which is not run.

    Pipelines give their schedulers timesteps, sigmas and shifts of their own, which
    `set_timesteps` with a number of steps does not know.

    Args:
        pipe: The pipeline; left as any call leaves it.
        call: Such as `Sampler.calls` returns.

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
        found.append(FirstCall(copy.deepcopy(pipe.scheduler), len(sample)))
        raise _CalledError

    hook = denoiser_of(pipe).register_forward_pre_hook(stop, with_kwargs=True)
    with hooked([hook]), contextlib.suppress(_CalledError):
        call(pipe)
    return found[0]
