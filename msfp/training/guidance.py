"""The rows of trajectories that are guidance branches of one sample, and their coefficients."""

from __future__ import annotations

import inspect

from diffusers import DiffusionPipeline, DiTPipeline

from msfp.pipelines.class_conditional import ClassPipeline
from msfp.pipelines.sampler import Sampler


def guidance_branches(
    pipe: DiffusionPipeline, sampler: Sampler, rows: int
) -> tuple[tuple[float, ...], int]:
    """Return `guidance_branches` and `guidance_rows` of a `FinetuneConfig`.

    Args:
        pipe: A pipeline that may use classifier-free guidance.
        sampler: How it is called.
        rows: Rows of the trajectories for each call.

    Returns:
        The coefficients (1 - g, g) or (g, 1 - g), and the samples of a call, if a call has twice as
        many rows as samples. Otherwise a single guidance branch.
    """
    if rows != 2 * sampler.batch:
        return (1.0,), 1
    scale = sampler.guidance_scale
    if scale is None:
        known = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
        scale = sampler.extra.get("guidance_scale", None if known is None else known.default)
    if not isinstance(scale, int | float):
        return (1.0,), 1
    class_first = isinstance(pipe, DiTPipeline | ClassPipeline)
    return ((scale, 1 - scale) if class_first else (1 - scale, scale)), sampler.batch
