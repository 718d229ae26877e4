"""Recording what a denoiser is asked on a sampler's path, and asking it again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.pipelines.denoiser import denoiser_of, timestep_or_none
from msfp.pipelines.sampler import PipelineCall, Progress, check_calls


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
    """What a denoiser saw and said along a sampler's path.

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
        """Ask a denoiser what another was asked on the path.

        Args:
            denoiser: One of the same architecture, in any precision.
            step: Numbers of sampler steps, shape (batch,); they may differ.
            row: Numbers of rows, shape (batch,). A pair may be asked more than once.

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


@dataclass(frozen=True)
class _Forward:
    """One recorded forward of a denoiser; its timesteps are those of all samples, or one."""

    timesteps: torch.Tensor | None
    sample: torch.Tensor
    prediction: torch.Tensor
    conditions: dict[str, Any]

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep; InputError if there is none, or more than one."""
        if self.timesteps is None:
            raise InputError("a recorded forward must be given a timestep")
        if (self.timesteps != self.timesteps[0]).any():
            raise InputError("all samples of a recorded forward must be at one timestep")
        return self.timesteps[0]


@contextmanager
def recorded(denoiser: nn.Module) -> Iterator[list[_Forward]]:
    """Record every forward of a denoiser inside the block."""
    forwards: list[_Forward] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        timesteps = timestep_or_none(module, args, kwargs)
        given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        sample = given.pop(next(iter(given)))
        conditions = {k: v for k, v in given.items() if k not in ("timestep", "return_dict")}
        forwards.append(
            _Forward(
                None if timesteps is None else timesteps.detach().clone(),
                sample.detach().clone(),
                prediction_of(output).detach().clone(),
                conditions,
            )
        )

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield forwards
    finally:
        handle.remove()


class Recording:
    """Records the path of a denoiser's inputs and outputs while someone else makes the calls.

    Args:
        calls: As for `record_trajectories`.

    Attributes:
        calls: The same calls, which are recorded when they are made.

    Example:
        >>> from msfp.search.observers import calibrate
        >>> from msfp.experiments.reference import ddim_pipeline
        >>> from msfp.pipelines.sampler import Sampler
        >>> pipe, recording = ddim_pipeline(), Recording(Sampler(2, batch=4).calls(8, seed=0))
        >>> calibration = calibrate(pipe, recording.calls)
        >>> tuple(recording.trajectories(pipe).samples.shape)  # nothing is called any more
        (2, 8, 1, 16, 16)
    """

    def __init__(self, calls: PipelineCall | Sequence[PipelineCall]) -> None:
        given = check_calls("calls", calls)
        self.calls = [self._recorded(index, call) for index, call in enumerate(given)]
        self._forwards: dict[int, list[_Forward]] = {}

    @property
    def missing(self) -> list[PipelineCall]:
        """The calls that were not made yet."""
        return [call for index, call in enumerate(self.calls) if index not in self._forwards]

    def _recorded(self, index: int, call: PipelineCall) -> PipelineCall:
        def make(pipe: DiffusionPipeline | nn.Module) -> None:
            with recorded(denoiser_of(pipe)) as forwards, torch.no_grad():
                call(pipe)
            self._forwards[index] = forwards

        return make

    def trajectories(
        self, pipe: DiffusionPipeline | nn.Module, progress: Progress | None = None
    ) -> Trajectories:
        """Make the calls that are missing and return the path, as `record_trajectories` does.

        What was recorded is not kept beside the path.
        """
        for call in self.missing:
            call(pipe)
            if progress is not None:
                progress(1)
        return _trajectories([self._forwards.pop(index) for index in range(len(self.calls))])


def record_trajectories(
    pipe: DiffusionPipeline | nn.Module,
    calls: PipelineCall | Sequence[PipelineCall],
    progress: Progress | None = None,
) -> Trajectories:
    """Make calls of a pipeline and return the path of its denoiser's inputs and outputs.

    Args:
        pipe: A pipeline, or the denoiser itself.
        calls: What to do with it, as for `calibrate`: a function, or several such as
            `Sampler.calls` and `prompt_calls` return. All must take the same steps, with samples
            and conditions of the same size.
        progress: Called after each call with the number of calls just made, 1.

    Returns:
        The path; the rows of later calls follow those of earlier ones.

    Raises:
        InputError: If the calls differ in their steps, sizes or other conditions, or a forward
            has no timestep or samples at several.

    Example:
        >>> from msfp.experiments.reference import ddim_pipeline
        >>> from msfp.pipelines.sampler import Sampler
        >>> paths = record_trajectories(ddim_pipeline(), Sampler(2, batch=4).calls(8, seed=0))
        >>> paths.timesteps.tolist(), tuple(paths.samples.shape)
        ([999, 499], (2, 8, 1, 16, 16))
    """
    return Recording(calls).trajectories(pipe, progress)


def _trajectories(batches: list[list[_Forward]]) -> Trajectories:
    """Return the path of the forwards of all calls."""
    if not batches or not batches[0]:
        raise InputError("calls must run the denoiser at least once")
    steps = [[forward.timestep.item() for forward in forwards] for forwards in batches]
    if any(each != steps[0] for each in steps):
        raise InputError("all calls must take the sampler through the same timesteps")
    return Trajectories(
        torch.stack([forward.timestep for forward in batches[0]]),
        _table([[forward.sample for forward in forwards] for forwards in batches], "sample"),
        _table([[forward.prediction for forward in forwards] for forwards in batches], "output"),
        _merged(batches),
    )


def _table(batches: Sequence[Sequence[torch.Tensor]], name: str) -> torch.Tensor:
    """Return tensors of calls and steps as one of shape (steps, rows, ...)."""
    shapes = {tuple(each.shape[1:]) for steps in batches for each in steps}
    if len(shapes) > 1:
        raise InputError(f"all calls must have {name} of one size, not {sorted(shapes)}")
    return torch.cat([torch.stack(list(steps)) for steps in batches], dim=1)


def _merged(batches: list[list[_Forward]]) -> dict[str, Any]:
    """Return the conditions of all forwards as one tree."""
    trees = [[forward.conditions for forward in forwards] for forwards in batches]
    rows = [len(forwards[0].sample) for forwards in batches]
    merged: dict[str, Any] = _merge(trees, rows, "conditions")
    return merged


def _merge(values: list[list[Any]], rows: list[int], name: str) -> Any:
    """Merge the values that one argument had in calls and steps.

    Args:
        values: One for each call and step.
        rows: How many samples each call has.
        name: What to call the argument.
    """
    first = values[0][0]
    if isinstance(first, dict | list | tuple):
        return _merge_parts(values, rows, name)
    if isinstance(first, torch.Tensor) and first.dim() and len(first) == rows[0]:
        return _row_condition(values, name)
    if not all(_equal(first, each) for steps in values for each in steps):
        raise InputError(f"{name} must be the same in all calls, or have a row for each sample")
    return first


def _merge_parts(values: list[list[Any]], rows: list[int], name: str) -> Any:
    """Merge dictionaries and lists, part by part."""
    first = values[0][0]
    keys = list(first) if isinstance(first, dict) else range(len(first))
    if any(type(each) is not type(first) or len(each) != len(first) for v in values for each in v):
        raise InputError(f"{name} must have the same parts in all calls")
    parts = {
        key: _merge([[each[key] for each in steps] for steps in values], rows, f"{name}.{key}")
        for key in keys
    }
    return parts if isinstance(first, dict) else list(parts.values())


def _row_condition(values: list[list[torch.Tensor]], name: str) -> RowCondition:
    """Merge tensors that have a row for each sample."""
    constant = all(_equal(steps[0], each) for steps in values for each in steps)
    return RowCondition(_table([steps[:1] if constant else steps for steps in values], name))


def _equal(one: Any, other: Any) -> bool:
    """Return whether two arguments are the same, tensors by their numbers."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(one == other)


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
