"""Denoising factors of any scheduler, by calling its own `step` with nearby model outputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import SchedulerMixin

from msfp.errors import InputError
from msfp.schedulers.closed_forms import Target

PROBE_SHAPE = (1, 3, 1, 4, 4)
"""One frame of video: some schedulers take nothing of fewer dimensions."""
TOLERANCE = 1e-6
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Of samples, where a scheduler computes in float32 whatever it is given."""


def probe(
    scheduler: SchedulerMixin, target: Target, arguments: dict[str, Any]
) -> list[tuple[float, float]]:
    """Measure (timestep, factor) of every model call on the scheduler's grid.

    At each call a copy of the scheduler steps with a model output raised by 1, another with one
    lowered by 1, and the scheduler itself with the one between, which becomes history. All three
    draw the same noise.

    Args:
        scheduler: Fresh, its timesteps set; it is stepped to the end, in float64.
        target: What the factor is the derivative of.
        arguments: What the pipeline hands to `step` beyond output, timestep and sample.

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
    """Return the timesteps at which a pipeline calls the model, in its order."""
    timesteps = list(scheduler.timesteps)
    name = type(scheduler).__name__
    if name in ("DDPMWuerstchenScheduler", "SCMScheduler"):  # they list the end of the grid too
        timesteps.pop()
    if name == "DDPMWuerstchenScheduler":  # its step wants one timestep for each sample
        timesteps = [timestep.reshape(1) for timestep in timesteps]
    if name == "RePaintScheduler":  # it jumps back to noise without the model
        pairs = zip([timesteps[0] + 1, *timesteps], timesteps, strict=False)
        timesteps = [timestep for before, timestep in pairs if timestep < before]
    return timesteps


def _pipeline_arguments(
    scheduler: SchedulerMixin, timesteps: list[torch.Tensor], call: int, x0: torch.Tensor | None
) -> dict[str, Any]:
    """Return what a scheduler's pipelines always hand to `step`, for those that need more."""
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
        case "RePaintScheduler":  # all of the image is to be painted
            return dict.fromkeys(("original_image", "mask"), torch.zeros(PROBE_SHAPE))
        case "RFD4ProteinaScheduler":  # all of the tokens are there
            return {"emit_mask": torch.ones(1)}
        case "UnCLIPScheduler":
            return {"prev_timestep": timesteps[call + 1] if call + 1 < len(timesteps) else None}
    return {}


def _prepare(scheduler: SchedulerMixin) -> None:
    """Take the scheduler's tables to the CPU and float64, and start at the first timestep.

    In float32, small factors would drown in the rounding of the samples.
    """
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "timesteps":
            setattr(scheduler, name, value.cpu().double())
    scheduler.timesteps = scheduler.timesteps.cpu()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def _fork(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return a copy with its own history.

    Shared are the config, and torchsde's noise, which cannot be copied and does not change.
    """
    shared = (scheduler.config, getattr(scheduler, "noise_sampler", None))
    return copy.deepcopy(scheduler, {id(each): each for each in shared})


def _step(
    scheduler: SchedulerMixin, output: torch.Tensor, given: dict[str, Any]
) -> dict[str, torch.Tensor | None]:
    """Return the next sample and, where the scheduler tells it, x0, with the same noise always."""
    name = type(scheduler).__name__
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(given["sample"], given["timestep"])
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    if learned:  # the second half of the channels tells the variance
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
    """Return the slope through three results, from outputs one apart.

    Raises:
        InputError: If there is no such result, or the three are not on a line.
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
