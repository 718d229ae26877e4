"""Denoising factors in closed form, for samplers with a published update rule.

A grid point is a pair of levels: x = alpha * x0 + sigma * noise. Every sampler here computes x0 or
the noise from the model output, and the next sample from that. A factor is therefore a coefficient
of the sampler times the slope of x0 (or noise) in the model output. Values at the next point of the
grid are called `next_alpha` and `next_sigma`. All arrays are float64 of shape (model calls,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)

from msfp.errors import InputError

Array = npt.NDArray[np.float64]
Target = Literal["next_sample", "x0"]


class Slopes(NamedTuple):
    """d(next sample) / d(model output) and d(x0) / d(model output), at each model call."""

    next_sample: Array
    x0: Array


def closed_form(
    scheduler: SchedulerMixin, target: Target, arguments: dict[str, Any]
) -> list[tuple[float, float]] | None:
    """Return (timestep, factor) of every model call on the scheduler's grid, by its formula.

    Args:
        scheduler: A scheduler with its timesteps set. It is not changed.
        target: The quantity whose derivative is the factor.
        arguments: Arguments of `step` other than the model output, timestep and sample.

    Returns:
        The factors in the sampler's order, or None if no formula is known for this scheduler with
        these arguments.
    """
    formula, known = FORMULAS.get(type(scheduler), (None, frozenset()))
    if formula is None or not known.issuperset(arguments):
        return None
    with np.errstate(all="ignore"):  # the caller refuses values that are not finite
        slopes: Array = getattr(formula(scheduler, **arguments), target)
    return list(zip(scheduler.timesteps.tolist(), slopes.tolist(), strict=True))


def x0_slope(prediction: str, alpha: Array, sigma: Array) -> Array:
    """Return d(x0) / d(model output) for a prediction type."""
    slopes = {
        "epsilon": -sigma / alpha,
        "v_prediction": -sigma,
        "flow_prediction": -sigma,
        "sample": np.ones_like(sigma),
        "original_sample": np.ones_like(sigma),
    }
    if prediction not in slopes:
        raise InputError(f"prediction_type must be one of {sorted(slopes)}, not {prediction!r}")
    return slopes[prediction]


def noise_slope(prediction: str, alpha: Array, sigma: Array) -> Array:
    """Return d(noise) / d(model output), not derived from `x0_slope` because alpha may be 0."""
    slopes = {
        "epsilon": np.ones_like(sigma),
        "v_prediction": alpha,
        "sample": -alpha / sigma,
    }
    if prediction not in slopes:
        raise InputError(f"prediction_type must be one of {sorted(slopes)}, not {prediction!r}")
    return slopes[prediction]


def _double(values: torch.Tensor) -> Array:
    """Return a tensor as a float64 array."""
    return values.detach().cpu().double().numpy()


def _levels(bars: Array) -> tuple[Array, Array]:
    """Return alpha and sigma of variance-preserving noise from the cumulative products."""
    return np.sqrt(bars), np.sqrt(1 - bars)


def _bars_at(scheduler: SchedulerMixin, timesteps: npt.NDArray[np.int64], last: float) -> Array:
    """Return the cumulative products of alpha at timesteps, or `last` at negative timesteps."""
    bars = _double(scheduler.alphas_cumprod)
    return np.where(timesteps >= 0, bars[np.maximum(timesteps, 0)], last)


def ddpm(scheduler: SchedulerMixin) -> Slopes:
    """Ho et al., NeurIPS 2020, eq. 7: the posterior mean; the next point is the grid's next."""
    timesteps = scheduler.timesteps.cpu().numpy()
    bars = _bars_at(scheduler, timesteps, 1.0)
    next_bars = _bars_at(scheduler, np.append(timesteps[1:], -1), 1.0)
    alpha, sigma = _levels(bars)
    x0 = x0_slope(scheduler.config.prediction_type, alpha, sigma)
    return Slopes(np.sqrt(next_bars) * (1 - bars / next_bars) / sigma**2 * x0, x0)


def ddim(scheduler: SchedulerMixin, eta: float = 0.0) -> Slopes:
    """Song et al., ICLR 2021, eq. 12 and 16; diffusers steps by a constant stride."""
    timesteps = scheduler.timesteps.cpu().numpy()
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = scheduler.final_alpha_cumprod.item()
    bars = _bars_at(scheduler, timesteps, last)
    next_bars = _bars_at(scheduler, timesteps - stride, last)
    alpha, sigma = _levels(bars)
    variance = eta**2 * (1 - next_bars) / (1 - bars) * (1 - bars / next_bars)
    direction = np.sqrt(1 - next_bars - variance)
    prediction = scheduler.config.prediction_type
    x0 = x0_slope(prediction, alpha, sigma)
    noise = noise_slope(prediction, alpha, sigma)
    return Slopes(np.sqrt(next_bars) * x0 + direction * noise, x0)


def pndm(scheduler: SchedulerMixin) -> Slopes:
    """Liu et al., ICLR 2022, eq. 11 to 13: a DDIM step with a weighted sum of outputs."""
    starts, ends, weights = map(np.array, zip(*_pndm_transitions(scheduler), strict=True))
    last = scheduler.final_alpha_cumprod.item()
    alpha, sigma = _levels(_bars_at(scheduler, starts, last))
    next_alpha, next_sigma = _levels(_bars_at(scheduler, ends, last))
    prediction = scheduler.config.prediction_type
    noise = noise_slope(prediction, alpha, sigma)
    own_levels = _levels(_bars_at(scheduler, scheduler.timesteps.cpu().numpy(), last))
    return Slopes(
        weights * (next_sigma - next_alpha * sigma / alpha) * noise,
        x0_slope(prediction, *own_levels),
    )


def _pndm_transitions(scheduler: SchedulerMixin) -> list[tuple[int, int, float]]:
    """Return the start and end of each model call's step, and the weight of its output."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    starts = scheduler.prk_timesteps  # the four model calls of Runge-Kutta share a start
    adams_bashforth = [1.0, 1 / 2, 3 / 2, 23 / 12] if len(starts) == 0 else []
    transitions = []
    for call, timestep in enumerate(scheduler.timesteps.tolist()):
        if call < len(starts):
            end = timestep - (0 if call % 2 else stride // 2)
            transitions.append((int(starts[call // 4 * 4]), end, 1 / 6 if call % 4 == 3 else 1.0))
        elif call == 1:  # the first step is repeated with the mean of both outputs
            transitions.append((timestep + stride, timestep, 1 / 2))
        else:
            weight = adams_bashforth[call] if call < len(adams_bashforth) else 55 / 24
            transitions.append((timestep, timestep - stride, weight))
    return transitions


def euler(scheduler: SchedulerMixin) -> Slopes:
    """Karras et al., NeurIPS 2022, algorithm 1: x + (sigma' - sigma) (x - x0) / sigma.

    Its samples are the variance-preserving samples divided by alpha.
    """
    # With log-linear interpolation, the scheduler has one level more than its steps use.
    sigmas = _double(scheduler.sigmas)[: len(scheduler.timesteps) + 1]
    sigma, next_sigma = sigmas[:-1], sigmas[1:]
    alpha = 1 / np.sqrt(sigma**2 + 1)
    x0 = x0_slope(scheduler.config.prediction_type, alpha, sigma * alpha)
    return Slopes((1 - next_sigma / sigma) * x0, x0)


def flow_match_euler(scheduler: SchedulerMixin) -> Slopes:
    """Lipman et al., ICLR 2023: x + (sigma' - sigma) velocity, x0 at sigma = 0 (1 if inverted)."""
    sigmas = _double(scheduler.sigmas)
    sigma, next_sigma = sigmas[:-1], sigmas[1:]
    if scheduler.config.get("stochastic_sampling", False):
        return Slopes(-(1 - next_sigma) * sigma, -sigma)
    inverted = scheduler.config.get("invert_sigmas", False)
    return Slopes(next_sigma - sigma, 1 - sigma if inverted else -sigma)


def dpm_solver(scheduler: SchedulerMixin) -> Slopes:
    """Lu et al., NeurIPS 2022 (DPM-Solver) and arXiv 2211.01095 (DPM-Solver++).

    A step extrapolates the model's x0 (or noise, without ++) as D0 + D1 h + D2 h^2 / 2 in the half
    log-SNR lambda, and integrates it exactly. The factor is the coefficient of the latest output.
    """
    config = scheduler.config
    sigmas = _double(scheduler.sigmas)
    if config.use_flow_sigmas:
        alpha, sigma = 1 - sigmas, sigmas
    else:
        alpha = 1 / np.sqrt(sigmas**2 + 1)
        sigma = sigmas * alpha
    coefficients = _dpm_solver_coefficients(scheduler, alpha, sigma)
    prediction, levels = config.prediction_type, (alpha[:-1], sigma[:-1])
    x0 = -sigmas[:-1] if prediction == "flow_prediction" else x0_slope(prediction, *levels)
    data = config.algorithm_type.endswith("++")
    return Slopes(coefficients * (x0 if data else noise_slope(prediction, *levels)), x0)


def _dpm_solver_coefficients(scheduler: SchedulerMixin, alpha: Array, sigma: Array) -> Array:
    """Return each step's coefficient of its latest x0 (or noise, without ++)."""
    config, algorithm = scheduler.config, scheduler.config.algorithm_type
    single = isinstance(scheduler, DPMSolverSinglestepScheduler)
    orders = _singlestep_orders(scheduler) if single else _multistep_orders(scheduler)
    lambdas = np.log(alpha) - np.log(sigma)
    coefficients = []
    for call, order in enumerate(orders):
        points = lambdas[call - order + 1 : call + 2]
        h = points[-1] - (points[0] if single else points[-2])
        scale, k = {
            "dpmsolver++": (alpha[call + 1], h),
            "sde-dpmsolver++": (alpha[call + 1], 2 * h),
            "dpmsolver": (sigma[call + 1], -h),
            "sde-dpmsolver": (2 * sigma[call + 1], -h),
        }[algorithm]
        if single:
            latest = _singlestep_weights(points, config.solver_type)
        else:
            latest = _multistep_weights(points)
        integrals = _integrals(k, order, algorithm, config.solver_type)
        coefficients.append(scale * np.dot(integrals, latest))
    return np.array(coefficients)


def _integrals(k: float, order: int, algorithm: str, solver_type: str) -> list[float]:
    """Return the integrals that multiply D0, D1 and D2, up to the order.

    For D2, diffusers' SDE solver differs by 1 from the other solvers. The factor follows its step.
    """
    if order == 3 and algorithm == "sde-dpmsolver":
        raise InputError("solver_order must be 1 or 2 for algorithm_type sde-dpmsolver")
    zeroth = 1 - np.exp(-k)
    if order == 1:  # k is infinite where the grid ends at sigma = 0
        return [zeroth]
    if order == 2 and solver_type == "midpoint":
        return [zeroth, zeroth / 2]
    first = 1 - zeroth / k
    second = 1 / 2 - (k - zeroth) / k**2 - (1 if algorithm == "sde-dpmsolver++" else 0)
    return [zeroth, first, second][:order]


def _multistep_weights(lambdas: Array) -> list[float]:
    """Return the weight of the latest output in D0, D1, D2: differences from the latest point.

    Args:
        lambdas: Half log-SNR at the points of the outputs in use, oldest first, and at the next
            point.
    """
    *past, latest, after = lambdas
    h = after - latest
    if not past:
        return [1.0]
    r0 = (latest - past[-1]) / h
    if len(past) == 1:
        return [1.0, 1 / r0]
    r1 = (past[-1] - past[-2]) / h
    return [1.0, (1 + r0 / (r0 + r1)) / r0, 1 / (r0 * (r0 + r1))]


def _singlestep_weights(lambdas: Array, solver_type: str) -> list[float]:
    """Return the weight of the latest output in D0, D1, D2: differences from the oldest point."""
    first, *inner, after = lambdas
    if not inner:
        return [1.0]
    ratios = (np.array(inner) - first) / (after - first)
    r0 = ratios[-1]
    if len(inner) == 1 or solver_type == "midpoint":
        return [0.0, 1 / r0, 0.0][: len(inner) + 1]
    r1 = ratios[0]
    return [0.0, -r1 / (r0 * (r0 - r1)), 2 / (r0 * (r0 - r1))]


def _multistep_orders(scheduler: SchedulerMixin) -> list[int]:
    """Return the order of each step: lower at the start, and at the end if so configured."""
    config, count = scheduler.config, len(scheduler.timesteps)
    orders = [min(config.solver_order, call + 1) for call in range(count)]
    short = config.lower_order_final and count < 15
    if count > 1 and short:
        orders[-2] = min(orders[-2], 2)
    if short or config.euler_at_final or config.final_sigmas_type == "zero":
        orders[-1] = 1
    return orders


def _singlestep_orders(scheduler: SchedulerMixin) -> list[int]:
    """Return the order of each step, from the scheduler's own list."""
    orders = scheduler.order_list[: len(scheduler.timesteps)]
    return [min(order, call + 1) for call, order in enumerate(orders)]


FORMULAS: dict[type, tuple[Callable[..., Slopes], frozenset[str]]] = {
    DDPMScheduler: (ddpm, frozenset()),
    DDPMParallelScheduler: (ddpm, frozenset()),
    DDIMScheduler: (ddim, frozenset({"eta"})),
    DDIMParallelScheduler: (ddim, frozenset({"eta"})),
    PNDMScheduler: (pndm, frozenset()),
    DPMSolverMultistepScheduler: (dpm_solver, frozenset()),
    DPMSolverSinglestepScheduler: (dpm_solver, frozenset()),
    EulerDiscreteScheduler: (euler, frozenset()),
    FlowMatchEulerDiscreteScheduler: (flow_match_euler, frozenset()),
}
"""The formula of each scheduler, and the arguments of `step` that it supports.

Subclasses have no formula, because their step may differ.
"""
