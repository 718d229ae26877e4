"""A denoiser's inputs and outputs along a sampler's path, to compare with other denoisers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.pipelines.denoiser import denoiser_of
from msfp.support.trees import mapped, tensors_in

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a forward."""


@dataclass(frozen=True)
class RowCondition:
    """An argument of a denoiser with one row for each sample, such as prompt embeddings.

    Attributes:
        values: Shape (steps, rows, ...), or (1, rows, ...) if the values are equal at all steps.
    """

    values: torch.Tensor

    def at(self, step: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Return the values at pairs of a step number and a row number."""
        return self.values[step if len(self.values) > 1 else torch.zeros_like(step), row]


@dataclass(frozen=True)
class Trajectories:
    """A denoiser's inputs and outputs along a sampler's path.

    Attributes:
        timesteps: Timestep inputs of the denoiser, shape (steps,), in the sampler's order.
        samples: Noisy inputs x_t, shape (steps, rows, channels, height, width), or another shape
            that the denoiser takes. With classifier-free guidance, the two guidance branches are
            separate rows.
        predictions: Outputs of the denoiser for these inputs, shape (steps, rows, ...).
        conditions: All other arguments, by name. Tensors with one row for each sample are
            `RowCondition`, also inside dictionaries and lists. All other values are unchanged.
        timed: Whether the denoiser is given `timesteps` as its argument `timestep`. Otherwise its
            timestep, if it has one, is among the conditions.
    """

    timesteps: torch.Tensor
    samples: torch.Tensor
    predictions: torch.Tensor
    conditions: dict[str, Any] = field(default_factory=dict)
    timed: bool = True

    def predict(
        self, model: DiffusionPipeline | nn.Module, step: torch.Tensor, row: torch.Tensor
    ) -> torch.Tensor:
        """Return the prediction of a denoiser for the recorded inputs.

        Args:
            model: A denoiser of the recorded architecture in any precision, or its pipeline.
            step: Step number of each sample, shape (batch,).
            row: Row number of each sample, shape (batch,). A pair of step and row may occur more
                than once.

        Returns:
            The prediction, with the shape of `predictions[step, row]`.
        """
        conditions = {name: _at(value, step, row) for name, value in self.conditions.items()}
        if self.timed:
            conditions["timestep"] = self.timesteps[step]
        output = denoiser_of(model)(self.samples[step, row], **conditions)
        return prediction_of(output)

    def of_sample(self, predictions: torch.Tensor) -> torch.Tensor:
        """Return predictions (batch, channels, ...) without a learned variance.

        If predictions have twice as many channels as samples, the second half is the variance, and
        pipelines ignore it.

        Example:
            >>> path = Trajectories(torch.zeros(1), torch.zeros(1, 3, 4, 8, 8), torch.zeros(0))
            >>> path.of_sample(torch.zeros(3, 8, 8, 8)).shape
            torch.Size([3, 4, 8, 8])
        """
        channels = self.samples.shape[2] if self.samples.dim() == 5 else 0
        twice = predictions.dim() == 4 and predictions.shape[1] == 2 * channels
        return predictions[:, :channels] if twice else predictions


@dataclass(frozen=True)
class WholeForwards(Trajectories):
    """Trajectories of forwards whose samples cannot be taken apart, or put together otherwise.

    Each recorded forward is one row here, with all samples that it had. Its numbers are one vector,
    with zeros at the end where other forwards have more. `predict` runs the forwards one by one.

    Attributes:
        samples: Numbers of the first argument, shape (steps, forwards, numbers).
        predictions: Numbers of all outputs, shape (steps, forwards, numbers).
        arguments: Positional and keyword arguments of each forward, by step and row.
    """

    arguments: tuple[tuple[Arguments, ...], ...] = ()

    def predict(
        self, model: DiffusionPipeline | nn.Module, step: torch.Tensor, row: torch.Tensor
    ) -> torch.Tensor:
        """Return the outputs of a denoiser for the recorded arguments, one vector for each row."""
        denoiser, numbers = denoiser_of(model), self.predictions.shape[-1]
        outputs = []
        for which, forward in zip(step.tolist(), row.tolist(), strict=True):
            args, kwargs = mapped(self.arguments[which][forward], torch.clone)  # it may change them
            outputs.append(as_vector(denoiser(*args, **kwargs), numbers))
        return torch.stack(outputs)


def as_vector(tree: Any, numbers: int | None = None) -> torch.Tensor:
    """Return the floating-point numbers of a tree in one vector, padded with zeros to a length.

    Example:
        >>> as_vector([torch.ones(1), {"a": torch.ones(1, 1)}], 3)
        tensor([1., 1., 0.])
    """
    parts = [x.reshape(-1) for x in tensors_in(tree) if x.is_floating_point()]
    vector = torch.cat(parts) if parts else torch.zeros(0)
    return vector if numbers is None else F.pad(vector, (0, numbers - len(vector)))


def prediction_of(output: Any) -> torch.Tensor:
    """Return the prediction from a denoiser's result: its one tensor, or the first of a tuple.

    Raises:
        InputError: If there is none.
    """
    if isinstance(output, torch.Tensor):
        return output
    if not isinstance(output, tuple) and isinstance(getattr(output, "sample", None), torch.Tensor):
        sample: torch.Tensor = output.sample
        return sample
    found = next(iter(tensors_in(output)), None)
    if found is None:
        raise InputError(f"the denoiser must return tensors, not {type(output).__name__}")
    return found


def _at(value: Any, step: torch.Tensor, row: torch.Tensor) -> Any:
    """Return a condition at a batch of pairs of a step and a row."""
    if isinstance(value, RowCondition):
        return value.at(step, row)
    if isinstance(value, dict):
        return {key: _at(each, step, row) for key, each in value.items()}
    if isinstance(value, list):
        return [_at(each, step, row) for each in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def draw_batch(
    steps: int, count: int, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch: evenly spread sampler steps from a random offset, and random rows.

    Args:
        steps: Number of sampler steps.
        count: Number of rows of the trajectories.
        size: Number of samples in the batch.
        generator: Source of randomness.

    Returns:
        The step number and the row number of each sample, both of shape (size,).

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
    """Draw a batch without repetition: steps as evenly as possible, and random rows at each step.

    Args:
        steps: Number of sampler steps.
        rows: Number of rows.
        size: Number of samples in the batch. All samples are drawn if there are fewer.
        generator: Source of randomness.

    Returns:
        The step number and the row number of each sample, both one-dimensional.

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
