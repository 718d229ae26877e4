"""Denoising factors of any scheduler, measured by calling `step` with nearby model outputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import SchedulerMixin

from msfp.errors import InputError
from msfp.schedulers.closed_forms import Target

PROBE_SHAPE = (1, 3, 1, 4, 4)
"""Shape of one video frame, because some schedulers require five dimensions."""
TOLERANCE = 1e-6
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Relative rounding error of samples, for schedulers that always compute in float32."""


def probe(
    scheduler: SchedulerMixin, target: Target, arguments: dict[str, Any]
) -> list[tuple[float, float]]:
    """Measure (timestep, factor) of every model call on the scheduler's grid.

    At each model call, one copy of the scheduler steps with the model output plus 1, and another
    copy with the model output minus 1. The scheduler itself steps with the unchanged output, which
    becomes its history. All three draw the same noise.

    Args:
        scheduler: A scheduler with its timesteps set and no step taken. It is stepped to the end,
            in float64.
        target: The quantity whose derivative is the factor.
        arguments: Arguments of `step` other than the model output, timestep and sample.

    Returns:
        The factors in the sampler's order.

    Raises:
        InputError: If the step cannot be called, does not return the target, or is not affine in
            the model output.
    """
    _prepare(scheduler)
    draw = torch.Generator().manual_seed(0)
    factors = []
    x0 = None
    timesteps = model_calls(scheduler)
    for call, timestep in enumerate(timesteps):
        sample, output = torch.randn(2, *PROBE_SHAPE, generator=draw, dtype=torch.float64)
        given = {
            "timestep": timestep,
            "sample": sample,
            **_pipeline_arguments(scheduler, timesteps, call, x0),
            **arguments,
        }
        raised = _step(_fork(scheduler), output + 1, given)
        lowered = _step(_fork(scheduler), output - 1, given)
        middle = _step(scheduler, output, given)
        x0 = middle["x0"]
        factors.append(
            (timestep.item(), _slope(scheduler, target, timestep, lowered, middle, raised))
        )
    return factors


def model_calls(scheduler: SchedulerMixin) -> list[torch.Tensor]:
    """Return the timesteps at which a pipeline calls the model, in order."""
    timesteps = list(scheduler.timesteps)
    name = type(scheduler).__name__
    if name in ("DDPMWuerstchenScheduler", "SCMScheduler"):  # they list the grid's end too
        timesteps.pop()
    if name == "DDPMWuerstchenScheduler":  # its step takes one timestep for each sample
        timesteps = [timestep.reshape(1) for timestep in timesteps]
    if name == "RePaintScheduler":  # it jumps back to higher noise without a model call
        pairs = zip([timesteps[0] + 1, *timesteps], timesteps, strict=False)
        timesteps = [timestep for before, timestep in pairs if timestep < before]
    return timesteps


def _pipeline_arguments(
    scheduler: SchedulerMixin, timesteps: list[torch.Tensor], call: int, x0: torch.Tensor | None
) -> dict[str, Any]:
    """Return the additional arguments of `step` that a scheduler's pipelines always pass."""
    match type(scheduler).__name__:
        case "CogVideoXDPMScheduler":
            before = timesteps[call - 1] if call else None
            return {"old_pred_original_sample": x0, "timestep_back": before}
        case "HeliosDMDScheduler":
            return {
                "cur_sampling_step": call,
                "dmd_noisy_tensor": torch.zeros(PROBE_SHAPE, dtype=torch.float64),
                "dmd_sigmas": scheduler.sigmas,
                "dmd_timesteps": scheduler.timesteps,
                "all_timesteps": scheduler.timesteps,
            }
        case "RePaintScheduler":  # the whole image is to be painted
            return dict.fromkeys(("original_image", "mask"), torch.zeros(PROBE_SHAPE))
        case "RFD4ProteinaScheduler":  # all tokens are present
            return {"emit_mask": torch.ones(1)}
        case "UnCLIPScheduler":
            return {"prev_timestep": timesteps[call + 1] if call + 1 < len(timesteps) else None}
    return {}


def _prepare(scheduler: SchedulerMixin) -> None:
    """Move the scheduler's tables to the CPU and float64, and start at the first timestep.

    In float32, the rounding errors of the samples would hide small factors.
    """
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "timesteps":
            setattr(scheduler, name, value.cpu().double())
    scheduler.timesteps = scheduler.timesteps.cpu()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def _fork(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return a copy of a scheduler with its own history.

    The copy shares the config and torchsde's noise, which cannot be copied and does not change.
    """
    shared = (scheduler.config, getattr(scheduler, "noise_sampler", None))
    return copy.deepcopy(scheduler, {id(each): each for each in shared})


def _step(
    scheduler: SchedulerMixin, output: torch.Tensor, given: dict[str, Any]
) -> dict[str, torch.Tensor | None]:
    """Return the next sample, and x0 if the scheduler returns it, always with the same noise."""
    name = type(scheduler).__name__
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(given["sample"], given["timestep"])
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    if learned:  # the second half of the channels is the variance
        output = torch.cat([output, torch.zeros_like(output)], dim=1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            result = scheduler.step(model_output=output, **given)
    except Exception as error:
        raise InputError(
            f"{name}.step cannot be called with {', '.join(given)} at timestep "
            f"{given['timestep'].item()}: {error}"
        ) from error
    if isinstance(result, tuple):
        return dict(zip(("next_sample", "x0"), result, strict=True))
    return {"next_sample": result.prev_sample, "x0": getattr(result, "pred_original_sample", None)}


def _slope(
    scheduler: SchedulerMixin,
    target: Target,
    timestep: torch.Tensor,
    *steps: dict[str, torch.Tensor | None],
) -> float:
    """Return the slope through the results of three steps, whose model outputs are 1 apart.

    Raises:
        InputError: If the steps do not return the target, or the three results are not on a line.
    """
    name = type(scheduler).__name__
    lowered, middle, raised = (step[target] for step in steps)
    if lowered is None or middle is None or raised is None:
        raise InputError(f"target must be 'next_sample': the step of {name} does not return its x0")
    slopes = torch.stack([raised - middle, middle - lowered])
    factor = slopes.mean()
    allowed = TOLERANCE * factor.abs() + ROUNDING * middle.abs().max()
    if torch.isfinite(factor) and (slopes - factor).abs().max() > allowed:
        raise InputError(
            f"scheduler must step affinely in the model output; {name} does not at timestep "
            f"{timestep.item()}"
        )
    return factor.item()
