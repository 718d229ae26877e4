"""Denoising-factor alignment: how much an error of the prediction moves the sampler's next sample.

The factor of a step is d(next sample) / d(model output). It is measured on the sampler's own
`step`, so it is right for any scheduler whose step is affine in the model output, on the grid of
timesteps that the sampler really visits.
"""

from __future__ import annotations

import copy
import math

import torch
from diffusers import SchedulerMixin

from msfp.errors import InputError

PROBE_SIZE = 64
TOLERANCE = 1e-6
WEIGHT_STEPS = 1024
"""The largest integer weight of a timestep."""


def _step(
    scheduler: SchedulerMixin, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """Return the scheduler's next sample, with the same noise at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        following: torch.Tensor = scheduler.step(output, timestep, sample).prev_sample
    return following


def denoising_factors(scheduler: SchedulerMixin, steps: int) -> dict[float, float]:
    """Measure the denoising factor of each step of a sampler.

    For DDIM without noise it equals `sqrt(1 - a') - sqrt(a' (1 - a) / a)`, with a and a' the
    cumulative products of alpha at this and the next timestep (Song et al., ICLR 2021, eq. 12).

    Args:
        scheduler: Any diffusers scheduler; it is copied, not changed.
        steps: Sampler steps.

    Returns:
        The factor at each timestep, in the sampler's order; of a timestep that the sampler
        visits twice, that of the second visit.

    Raises:
        InputError: If the step is not affine in the model output, as where samples are clipped.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> factors = denoising_factors(DDIMScheduler(clip_sample=False), 4)
        >>> {t: round(gamma, 3) for t, gamma in factors.items()}
        {750: -3.887, 500: -1.794, 250: -0.948, 0: -0.01}
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 1, PROBE_SIZE, 1, generator=draw, dtype=torch.float64)
    factors = {}
    for timestep in scheduler.timesteps:
        output = torch.randn(sample.shape, generator=draw, dtype=torch.float64)
        zero, one, two = (
            _step(copy.deepcopy(scheduler), k * output, timestep, sample) for k in range(3)
        )
        slope, again = (one - zero) / output, (two - one) / output
        factor = slope.median()
        scale = factor.abs().clamp(min=1e-12)
        if max((slope - factor).abs().max(), (again - factor).abs().max()) > TOLERANCE * scale:
            raise InputError(
                f"{type(scheduler).__name__} is not affine in the model output at timestep "
                f"{timestep.item()}: turn off clip_sample and thresholding in its config"
            )
        factors[timestep.item()] = factor.item()
        sample = _step(scheduler, output, timestep, sample)
    return factors


def timestep_weights(factors: dict[float, float], power: float) -> dict[float, float]:
    """Return the loss weight `abs(factor) ** power` of each timestep, normalised to a mean of 1.

    Power 1 is the paper's loss (section 4.3), 2 is exact for the squared error of the next
    sample, 0 weighs all timesteps alike.

    Example:
        >>> timestep_weights({10: -3.0, 0: -1.0}, 1)
        {10: 1.5, 0: 0.5}
    """
    raw = {timestep: abs(factor) ** power for timestep, factor in factors.items()}
    mean = sum(raw.values()) / len(raw)
    return {timestep: weight / mean for timestep, weight in raw.items()}


def integer_weights(factors: dict[float, float]) -> dict[float, int]:
    """Return the squares of factors as whole numbers, of which sums are exact.

    They are rounded to 1/1024 of the largest, and those below that are 1.

    Raises:
        InputError: If a factor is not finite, or all are 0.

    Example:
        >>> integer_weights({750: -4.0, 500: 2.0, 250: -0.01})
        {750: 1024, 500: 256, 250: 1}
    """
    squares = {timestep: factor**2 for timestep, factor in factors.items()}
    largest = max(squares.values(), default=0.0)
    if not (largest > 0 and math.isfinite(sum(squares.values()))):
        raise InputError("factors must be finite, and one of them other than 0")
    return {
        timestep: max(1, round(WEIGHT_STEPS * square / largest))
        for timestep, square in squares.items()
    }


def weight_at(weights: dict[float, int], timestep: float) -> int:
    """Return the weight of the timestep that is nearest to one.

    A denoiser in bfloat16 gets timesteps rounded to 1 part in 256, so that they need not be equal.

    Raises:
        InputError: If none is that near.

    Example:
        >>> weight_at({999: 1024, 501: 7}, 500.0)
        7
    """
    nearest = min(weights, key=lambda known: abs(known - timestep))
    if abs(nearest - timestep) > abs(nearest) / 256:
        raise InputError(
            f"factors has none for timestep {timestep:g}; it must have one for each timestep that "
            f"the denoiser's forward is given, and has {', '.join(f'{t:g}' for t in weights)}"
        )
    return weights[nearest]
