"""Measure what samplers make of small errors: `python docs/measure_samplers.py`.

Independent noise is added to every prediction of the full-precision UNet of digits, and the images
are compared with those without, from equal starting noise. Then multistep samplers run on outputs
that are fixed, to see what using an output again makes of it. Prints two tables of
docs/denoising-factors.md.
"""

import math
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
)
from rich.console import Console
from rich.table import Table

from msfp import reference_pipeline
from msfp.evaluation.whole_sets import paired_psnr
from msfp.schedulers.samplers import use_sampler

IMAGES = 32
SAMPLERS = ("ddim", "dpm++", "plms")
STEPS = (10, 20)
ERRORS = (1e-6, 1e-4, 1e-3)
"""Mean squared errors that are added to predictions of variance 1."""
MULTISTEP_STEPS = 20
MULTISTEP: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {}),
    "DPM-Solver++ 1": (DPMSolverMultistepScheduler, {"solver_order": 1}),
    "PLMS": (PNDMScheduler, {"skip_prk_steps": True}),
    "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {"solver_order": 2}),
    "DPM-Solver++ 3M": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "DEIS 2": (DEISMultistepScheduler, {"solver_order": 2}),
}
"""Classes and settings, on the noise schedule of the model of digits."""


@torch.no_grad()
def images(sampler: str, steps: int, error: float) -> torch.Tensor:
    """Return images in [0, 1] of predictions with an error."""
    pipe, generator = reference_pipeline(), torch.Generator().manual_seed(0)
    use_sampler(pipe, sampler)
    config = pipe.unet.config
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(
        IMAGES, config.in_channels, config.sample_size, config.sample_size, generator=generator
    )
    for timestep in pipe.scheduler.timesteps:
        noise = pipe.unet(x, timestep).sample
        noise = noise + error**0.5 * torch.randn(noise.shape, generator=generator)
        x = pipe.scheduler.step(noise, timestep, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def path(name: str, call: int, output: float, moved: float = 0.0) -> list[float]:
    """Return the sample after each call, where all outputs but one are 0.

    Args:
        name: Of a sampler.
        call: The one that returns `output`, and after which the sample is moved.
        output: What it returns.
        moved: What is added to the sample after it.
    """
    kind, settings = MULTISTEP[name]
    scheduler = kind.from_config(reference_pipeline().scheduler.config, **settings)
    scheduler.set_timesteps(MULTISTEP_STEPS)
    x, samples = torch.zeros(1, 1, 1, 1, dtype=torch.float64), []
    for index, timestep in enumerate(scheduler.timesteps):
        here = index == call
        x = scheduler.step(torch.full_like(x, output if here else 0.0), timestep, x).prev_sample
        x = x + (moved if here else 0.0)
        samples.append(x.item())
    return samples


def effects(name: str) -> list[float]:
    """Return the effect of each call's output on the image, relative to that of its own step.

    NaN for a call whose sample is thrown away.
    """
    # PLMS takes its second step twice.
    calls = MULTISTEP_STEPS + (name == "PLMS")
    found = []
    for call in range(calls):
        used = path(name, call, output=1.0)
        alone = path(name, call, output=0.0, moved=used[call])
        found.append(used[-1] / (alone[-1] or math.nan))
    return found


def history() -> Table:
    """Return the table of what using outputs again makes of them."""
    table = Table("sampler", "in the middle", "second", "3, 2 and 1 calls before the last")
    for name in MULTISTEP:
        found = effects(name)
        middle = found[len(found) // 2]
        before = ", ".join(f"{each:.2f}" for each in found[-4:-1])
        table.add_row(name, f"{middle:.2f}", f"{found[1]:.2f}", before)
    return table


def main() -> None:
    """Measure and print."""
    table = Table("sampler", "steps", *(f"{error:g}" for error in ERRORS))
    for sampler in SAMPLERS:
        for steps in STEPS:
            exact = images(sampler, steps, 0.0)
            found = (paired_psnr(images(sampler, steps, error), exact) for error in ERRORS)
            table.add_row(sampler, str(steps), *(f"{psnr:.0f}" for psnr in found))
    Console().print(table, history())


if __name__ == "__main__":
    main()
