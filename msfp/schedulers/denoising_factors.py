"""Denoising-factor alignment: how much an error of the prediction moves the sampler's next sample.

The factor of a step is d(next sample) / d(model output), on the grid of timesteps that the sampler
visits. It is known in closed form (`closed_forms`) or measured (`probe`).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import defaultdict
from numbers import Integral, Real
from typing import Any, Literal, get_args

from diffusers import SchedulerMixin

from msfp.errors import InputError
from msfp.schedulers.closed_forms import Target, closed_form
from msfp.schedulers.probe import probe

Clipping = Literal["refuse", "ignore"]
Normalisation = Literal["mean", "none"]

CLIPPING_FLAGS = ("clip_sample", "clip_denoised", "thresholding")
TOKENS = "its samples are tokens, which have no derivative by the output"
REFUSED = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "KarrasVeScheduler": "its step takes noise levels, not timesteps",
    "PiflowScheduler": "its model output is a policy of many values for each of the sample's",
    "ScoreSdeVeScheduler": "it has no step, but a predictor and a corrector",
    "ScoreSdeVpScheduler": "it has no step, but a predictor",
    "VQDiffusionScheduler": TOKENS,
}
"""Schedulers without a denoising factor, and the reason."""


def denoising_factors(
    scheduler: SchedulerMixin,
    steps: int | None = None,
    *,
    target: Target = "next_sample",
    clipping: Clipping = "refuse",
    **step_arguments: Any,
) -> dict[float, float]:
    """Return the denoising factor of each step of a sampler.

    The factor is the derivative of the result of the scheduler's `step` with respect to the model
    output, at every point of the sampler's grid. The earlier outputs of multistep schedulers and
    the noise of stochastic schedulers are held fixed. For DDIM without noise the factor is
    `sqrt(1 - a') - sqrt(a' (1 - a) / a)`, with a and a' the cumulative products of alpha at this
    and the next timestep (Song et al., ICLR 2021, eq. 12).

    Args:
        scheduler: Any diffusers scheduler. It is copied, not changed.
        steps: Sampler steps. None uses the grid of the scheduler's last `set_timesteps`, which may
            have received timesteps, sigmas or a shift.
        target: "next_sample", or "x0" for the final sample as predicted at this step.
        clipping: Treatment of a scheduler that clips or thresholds x0, and so has no single factor:
            "refuse" it, or "ignore" the clipping and return the factor of unclipped values.
        **step_arguments: Further arguments of `step`, such as `eta` of DDIM.

    Returns:
        The factor at each of the scheduler's timesteps, in the sampler's order. If the sampler
        visits a timestep more than once (Heun, PNDM), this is the root mean square of its factors,
        with the sign of the first.

    Raises:
        InputError: If an argument is not allowed, the scheduler has no factor (the message says
            why), or a factor is not finite.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> factors = denoising_factors(DDIMScheduler(clip_sample=False), 4)
        >>> {t: round(gamma, 3) for t, gamma in factors.items()}
        {750: -3.887, 500: -1.794, 250: -0.948, 0: -0.01}
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError(
            f"scheduler must be a scheduler of diffusers, such as that of a pipeline, not {name}"
        )
    if name in REFUSED:
        raise InputError(f"scheduler must have denoising factors; {name} has none: {REFUSED[name]}")
    _check_choice("target", target, get_args(Target))
    _check_choice("clipping", clipping, get_args(Clipping))
    _check_arguments(scheduler, step_arguments)
    sampler = copy.deepcopy(scheduler)
    _set_grid(sampler, steps)
    _treat_clipping(sampler, clipping)
    factors = closed_form(sampler, target, step_arguments)
    if factors is None:
        factors = probe(sampler, target, step_arguments)
    for timestep, factor in factors:
        if not math.isfinite(factor):
            raise InputError(
                f"scheduler must have finite factors; {name} has {factor} at {timestep}"
            )
    return _by_timestep(factors)


def timestep_weights(
    factors: dict[float, float], power: float, normalisation: Normalisation = "mean"
) -> dict[float, float]:
    """Return the loss weight `abs(factor) ** power` of each timestep.

    Args:
        factors: Factors that `denoising_factors` returned.
        power: 1 is the paper's loss (section 4.3). 2 is exact for the squared error of the target.
            0 gives all timesteps the same weight.
        normalisation: "mean" scales the weights to a mean of 1, so that the power does not change
            the effective learning rate. "none" does not scale them.

    Raises:
        InputError: If there are no factors, all factors are 0, a factor is not finite, or an
            argument is not allowed.

    Example:
        >>> timestep_weights({10: -3.0, 0: -1.0}, 1)
        {10: 1.5, 0: 0.5}
    """
    _check_choice("normalisation", normalisation, get_args(Normalisation))
    if not _is_finite(power) or power < 0:
        raise InputError(f"power must be 0 or above and finite, not {power!r}")
    for timestep, factor in factors.items():
        if not _is_finite(factor):
            raise InputError(
                f"factors must be finite numbers, not {factor!r} as at timestep {timestep}"
            )
    if not any(factors.values()):
        raise InputError("factors must be given, and not all of them 0")
    raw = {timestep: abs(factor) ** power for timestep, factor in factors.items()}
    mean = sum(raw.values()) / len(raw) if normalisation == "mean" else 1.0
    return {timestep: weight / mean for timestep, weight in raw.items()}


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise InputError unless a value is one of the allowed values."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {allowed}, not {value!r}")


def _is_finite(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, Real) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    """Return whether a value is a whole number; bools are not numbers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_arguments(scheduler: SchedulerMixin, arguments: dict[str, Any]) -> None:
    """Raise InputError unless the scheduler's step takes these arguments, and `eta` is a number."""
    own = {"self", "model_output", "timestep", "sample", "generator", "return_dict"}
    taken = set(inspect.signature(type(scheduler).step).parameters) - own
    if not taken.issuperset(arguments):
        raise InputError(
            f"step_arguments must be among {sorted(taken)} for {type(scheduler).__name__}, not "
            f"{sorted(arguments)}"
        )
    if not _is_finite(arguments.get("eta", 0)):
        raise InputError(f"eta must be a finite number, not {arguments['eta']!r}")


def _set_grid(scheduler: SchedulerMixin, steps: int | None) -> None:
    """Set the timesteps, or check that they are set and that no step has been taken.

    Raises:
        InputError: If the timesteps cannot be set, are not set, or a step has been taken.
    """
    name = type(scheduler).__name__
    if steps is None:
        state = vars(scheduler)
        if state.get("num_inference_steps") is None and not state.get("custom_timesteps"):
            raise InputError(f"steps must be given, or set_timesteps of {name} called first")
        if getattr(scheduler, "step_index", None):
            raise InputError(f"set_timesteps of {name} must be called again after sampling")
        return
    if not _is_whole(steps) or steps < 1:
        raise InputError(f"steps must be a whole number from 1 on, not {steps!r}")
    try:
        scheduler.set_timesteps(steps)
    except Exception as error:
        raise InputError(
            f"set_timesteps of {name} does not accept steps={steps} ({error}): "
            "call it with all its arguments first, and omit steps"
        ) from error


def _treat_clipping(scheduler: SchedulerMixin, clipping: Clipping) -> None:
    """Turn off clipping and thresholding, or raise InputError if they are on."""
    on = [flag for flag in CLIPPING_FLAGS if scheduler.config.get(flag)]
    if on and clipping == "refuse":
        raise InputError(
            f"scheduler must be affine in the model output, and {type(scheduler).__name__} is not "
            f"with {' and '.join(on)}: turn that off in its config, or give clipping='ignore'"
        )
    scheduler.register_to_config(**dict.fromkeys(on, False))


def _by_timestep(factors: list[tuple[float, float]]) -> dict[float, float]:
    """Return one factor for each timestep: the root mean square over the visits."""
    visits = defaultdict(list)
    for timestep, factor in factors:
        visits[timestep].append(factor)
    return {
        timestep: math.copysign(math.hypot(*each) / math.sqrt(len(each)), each[0])
        if len(each) > 1
        else each[0]
        for timestep, each in visits.items()
    }
