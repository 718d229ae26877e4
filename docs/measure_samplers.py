"""Measure what samplers make of small errors: `python docs/measure_samplers.py`.

Independent noise is added to every prediction of the full-precision UNet of digits, and the images
are compared with those without, from equal starting noise. Prints the table of
docs/denoising-factors.md.
"""

import torch
from rich.console import Console
from rich.table import Table

from msfp.evaluate import paired_psnr
from msfp.reference import ddim_pipeline
from msfp.schedulers import use_sampler

IMAGES = 32
SAMPLERS = ("ddim", "dpm++", "plms")
STEPS = (10, 20)
ERRORS = (1e-6, 1e-4, 1e-3)
"""Mean squared errors that are added to predictions of variance 1."""


@torch.no_grad()
def images(sampler: str, steps: int, error: float) -> torch.Tensor:
    """Return images in [0, 1] of predictions with an error."""
    pipe, generator = ddim_pipeline(), torch.Generator().manual_seed(0)
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


def main() -> None:
    """Measure and print."""
    table = Table("sampler", "steps", *(f"{error:g}" for error in ERRORS))
    for sampler in SAMPLERS:
        for steps in STEPS:
            exact = images(sampler, steps, 0.0)
            found = (paired_psnr(images(sampler, steps, error), exact) for error in ERRORS)
            table.add_row(sampler, str(steps), *(f"{psnr:.0f}" for psnr in found))
    Console().print(table)


if __name__ == "__main__":
    main()
