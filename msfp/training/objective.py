"""The loss: squared errors of the prediction, weighted by their effect in the sampler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from msfp.errors import InputError
from msfp.layers.lora.routers import TRAINING_TIMESTEPS
from msfp.pipelines.trajectories import Trajectories
from msfp.schedulers.denoising_factors import Normalisation, timestep_weights

OWN_ERRORS = 0.2
"""Weight of the guidance branches' own squared errors in the loss.

The unit is the squared error of the guided prediction for independent errors of the guidance
branches. Without this term, errors that cancel at one guidance scale grow undetected, and sampling
fails at any other scale.
"""
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Returns the targets of sampler steps and rows."""


def loss_weights(
    timesteps: torch.Tensor,
    factors: dict[float, float] | None,
    power: float,
    normalisation: Normalisation = "mean",
) -> torch.Tensor:
    """Return the loss weight of each of the trajectories' timesteps, shape (steps,).

    Args:
        timesteps: The denoiser's inputs; some pipelines divide the scheduler's timesteps by 1000.
        factors: The sampler's `denoising_factors`, needed unless the power is 0.
        power: Power of the factors in the weights.
        normalisation: As for `timestep_weights`.

    Raises:
        InputError: If a timestep has no factor.

    Example:
        >>> loss_weights(torch.tensor([10, 0]), {10: -3.0, 0: -1.0}, power=1)
        tensor([1.5000, 0.5000])
    """
    if power == 0:
        return torch.ones(len(timesteps))
    for scale in (1.0, 1.0 / TRAINING_TIMESTEPS):
        keys = [_nearest(t, scale, factors or {}) for t in timesteps.tolist()]
        found = [key for key in keys if key is not None]
        if len(found) == len(keys) and factors is not None:
            weights = timestep_weights(factors, power, normalisation)
            return torch.tensor([weights[key] for key in found])
    raise InputError(
        f"factors must be given for every recorded timestep where dfa_power is {power}: "
        "measure them with the sampler and step count that recorded the trajectories"
    )


def _nearest(timestep: float, scale: float, factors: dict[float, float]) -> float | None:
    """Return the key of the factors that equals a timestep, up to rounding, or None."""
    if scale == 1.0:
        return timestep if timestep in factors else None
    key = min(factors, key=lambda key: abs(key * scale - timestep), default=None)
    if key is None or abs(key * scale - timestep) > 4e-3 * abs(timestep):
        return None
    return key


class Objective:
    """The weighted squared errors of a denoiser's predictions.

    Args:
        weights: Weight of each sampler step, shape (steps,).
        guidance_branches: Coefficients of the guidance branches of one sample, a row for each.
        guidance_rows: Number of rows of one guidance branch before those of the next.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        guidance_branches: tuple[float, ...] = (1.0,),
        guidance_rows: int = 1,
    ) -> None:
        self.weights, self.guidance_branches = weights, torch.tensor(guidance_branches)
        self.guidance_rows = guidance_rows

    def count(self, path: Trajectories) -> int:
        """Return the number of samples of a path; each has one row for each guidance branch."""
        rows, branches = path.samples.shape[1], len(self.guidance_branches)
        if branches > 1 and rows % (branches * self.guidance_rows):
            raise InputError(
                f"trajectories must have a multiple of {branches * self.guidance_rows} rows "
                f"(guidance_rows = {self.guidance_rows} in each of {branches} guidance branches), "
                f"not {rows}"
            )
        return rows // branches

    def rows(self, step: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the steps and rows of samples, one for each guidance branch."""
        branches, block = len(self.guidance_branches), self.guidance_rows
        if branches == 1:
            return step, sample
        first = sample // block * block * branches + sample % block
        row = first[:, None] + torch.arange(branches) * block
        return step.repeat_interleave(branches), row.flatten()

    def errors(
        self,
        denoiser: nn.Module,
        path: Trajectories,
        targets: Predict,
        step: torch.Tensor,
        sample: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted mean squared error of each sample, shape (samples,), float32.

        Other outputs of the denoiser, such as a variance, are ignored. For guidance branches with
        coefficients c, the error is that of their weighted sum, plus `OWN_ERRORS * sum(c**2)` times
        the mean error of the single guidance branches.
        """
        rows = self.rows(step, sample)
        wanted = targets(*rows)
        off = path.of_sample(path.predict(denoiser, *rows) - wanted).float()
        off = off.unflatten(0, (-1, len(self.guidance_branches))).flatten(2)
        branches = self.guidance_branches.to(off.device)[:, None]
        # Not a product of matrices, which autocast would compute in a narrow dtype.
        errors: torch.Tensor = (branches * off).sum(dim=1).square().mean(dim=1)
        if len(self.guidance_branches) > 1:
            own = off.square().mean(dim=(1, 2))
            errors = errors + OWN_ERRORS * branches.square().sum() * own
        return errors * self.weights[step].to(off.device)

    @torch.no_grad()
    def held_out_error(
        self, denoiser: nn.Module, path: Trajectories, batch: int, steps: range
    ) -> float:
        """Return the sum over some sampler steps of the mean error over all samples of a path."""
        total = 0.0
        samples = torch.arange(self.count(path))
        for step in steps:
            errors = [
                self.errors(denoiser, path, recorded(path), torch.full_like(part, step), part)
                for part in samples.split(batch)
            ]
            total += torch.cat(errors).mean().item()
        return total


def recorded(path: Trajectories) -> Predict:
    """Return a function that gives the recorded predictions of a path as targets."""
    return lambda step, row: path.predictions[step, row]
