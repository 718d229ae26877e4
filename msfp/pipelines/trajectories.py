"""A denoiser's inputs and outputs along a sampler's path, and the same inputs for another one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class RowCondition:
    """An argument of a denoiser that has a row for each sample, such as prompt embeddings.

    Attributes:
        values: Shape (steps, rows, ...), or (1, rows, ...) where all steps have the same.
    """

    values: torch.Tensor

    def at(self, step: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Return the rows of steps, both given by number."""
        return self.values[step if len(self.values) > 1 else torch.zeros_like(step), row]


@dataclass(frozen=True)
class Trajectories:
    """A denoiser's inputs and outputs along a sampler's path.

    Attributes:
        timesteps: What the denoiser was given, shape (steps,), in the sampler's order.
        samples: Noisy inputs x_t, shape (steps, rows, channels, height, width), or of whatever
            shape the denoiser reads. With classifier-free guidance, the two branches are rows.
        predictions: The denoiser's outputs there, shape (steps, rows, ...).
        conditions: The other arguments by name: tensors with a row for each sample as
            `RowCondition`, in dictionaries and lists if need be, and all else as it was given.
    """

    timesteps: torch.Tensor
    samples: torch.Tensor
    predictions: torch.Tensor
    conditions: dict[str, Any] = field(default_factory=dict)

    def predict(self, denoiser: nn.Module, step: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Return what a denoiser predicts from the recorded inputs.

        Args:
            denoiser: Of the architecture that was recorded, in any precision.
            step: Numbers of sampler steps, shape (batch,); they may differ.
            row: Numbers of rows, shape (batch,). A pair may occur more than once.

        Returns:
            Its prediction, of the shape of `predictions[step, row]`.
        """
        conditions = {name: _at(value, step, row) for name, value in self.conditions.items()}
        output = denoiser(self.samples[step, row], timestep=self.timesteps[step], **conditions)
        return prediction_of(output)

    def of_sample(self, predictions: torch.Tensor) -> torch.Tensor:
        """Return the channels of predictions (batch, channels, ...) that are of the sample's.

        Where there are twice as many, the second half is a variance, which pipelines drop.

        Example:
            >>> path = Trajectories(torch.zeros(1), torch.zeros(1, 3, 4, 8, 8), torch.zeros(0))
            >>> path.of_sample(torch.zeros(3, 8, 8, 8)).shape
            torch.Size([3, 4, 8, 8])
        """
        channels = self.samples.shape[2] if self.samples.dim() == 5 else 0
        twice = predictions.dim() == 4 and predictions.shape[1] == 2 * channels
        return predictions[:, :channels] if twice else predictions


def prediction_of(output: Any) -> torch.Tensor:
    """Return the prediction in what a denoiser's forward gave: a tensor, a tuple or an output."""
    if isinstance(output, torch.Tensor):
        return output
    prediction: torch.Tensor = output[0] if isinstance(output, tuple) else output.sample
    return prediction


def _at(value: Any, step: torch.Tensor, row: torch.Tensor) -> Any:
    """Return a condition for a batch of steps and rows."""
    if isinstance(value, RowCondition):
        return value.at(step, row)
    if isinstance(value, dict):
        return {key: _at(each, step, row) for key, each in value.items()}
    if isinstance(value, list):
        return [_at(each, step, row) for each in value]
    return value


def draw_batch(
    steps: int, count: int, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch: evenly spread sampler steps from a random offset, and random rows.

    Args:
        steps: Sampler steps to draw from.
        count: Rows of the trajectories to draw from.
        size: Samples in the batch.
        generator: Source of randomness.

    Returns:
        The number of the step and that of the row of each sample, both of shape (size,).

    Example:
        >>> step, row = draw_batch(20, 100, 5, torch.Generator().manual_seed(0))
        >>> step.tolist()
        [4, 8, 12, 16, 0]
    """
    offset = torch.randint(steps, (1,), generator=generator)
    step = (offset + torch.arange(size) * steps // size) % steps
    return step, torch.randint(count, (size,), generator=generator)


def spread_batch(
    steps: int, rows: int, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch without repetition: steps as evenly as can be, and random rows at each.

    Args:
        steps: Sampler steps to draw from.
        rows: Rows to draw from.
        size: Samples in the batch, or all that there are if these are fewer.
        generator: Source of randomness.

    Returns:
        The number of the step and that of the row of each sample, both one-dimensional.

    Example:
        >>> step, row = spread_batch(2, 3, 100, torch.Generator().manual_seed(0))
        >>> step.tolist(), sorted(row[:3].tolist())
        ([0, 0, 0, 1, 1, 1], [0, 1, 2])
    """
    size = min(size, steps * rows)
    each = -(-size // steps)
    drawn = torch.stack([torch.randperm(rows, generator=generator)[:each] for _ in range(steps)])
    chosen = torch.arange(size) * (steps * each) // size
    return chosen // each, drawn.flatten()[chosen]
