"""Recording a denoiser's inputs and outputs while its pipeline samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.pipelines.denoiser import denoiser_of, timestep_or_none
from msfp.pipelines.sampler import PipelineCall, check_calls
from msfp.pipelines.trajectories import RowCondition, Trajectories, prediction_of
from msfp.support.hooks import hooked
from msfp.support.progress import Progress, counted, no_progress


@dataclass(frozen=True)
class _Forward:
    """One recorded forward call; `timesteps` has one value for each sample, or one for all."""

    timesteps: torch.Tensor | None
    sample: torch.Tensor
    prediction: torch.Tensor
    conditions: dict[str, Any]

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep of the call; raises InputError if there is none, or more than one."""
        if self.timesteps is None:
            raise InputError("a recorded forward must be given a timestep")
        if (self.timesteps != self.timesteps[0]).any():
            raise InputError("all samples of a recorded forward must be at one timestep")
        return self.timesteps[0]


@contextmanager
def recorded(denoiser: nn.Module) -> Iterator[list[_Forward]]:
    """Record every forward call of a denoiser inside the block."""
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

    with hooked([denoiser.register_forward_hook(hook, with_kwargs=True)]):
        yield forwards


class Recording:
    """Records the path of a denoiser's inputs and outputs while another function makes the calls.

    Args:
        calls: One or more functions that run the model, as for `record_trajectories`.

    Attributes:
        calls: The same functions, with recording added.

    Example:
        >>> from msfp import Sampler, calibrate, reference_pipeline
        >>> pipe, recording = reference_pipeline(), Recording(Sampler(2, batch=4).calls(8, seed=0))
        >>> calibration = calibrate(pipe, calls=recording.calls)
        >>> tuple(recording.trajectories(pipe).samples.shape)  # without a further call
        (2, 8, 1, 16, 16)
    """

    def __init__(self, calls: PipelineCall | Sequence[PipelineCall]) -> None:
        given = check_calls("calls", calls)
        self.calls = [self._recorded(index, call) for index, call in enumerate(given)]
        self._forwards: dict[int, list[_Forward]] = {}

    def _recorded(self, index: int, call: PipelineCall) -> PipelineCall:
        def make(model: DiffusionPipeline | nn.Module) -> None:
            with recorded(denoiser_of(model)) as forwards, torch.no_grad():
                call(model)
            self._forwards[index] = forwards

        return make

    def trajectories(
        self, model: DiffusionPipeline | nn.Module, progress: Progress = no_progress
    ) -> Trajectories:
        """Make the remaining calls and return the path, as `record_trajectories` does.

        The recordings of the single calls are then released.
        """
        missing = [call for index, call in enumerate(self.calls) if index not in self._forwards]
        done = counted(progress, "recording", len(missing))
        for call in missing:
            call(model)
            done(1)
        return _trajectories([self._forwards.pop(index) for index in range(len(self.calls))])


def record_trajectories(
    model: DiffusionPipeline | nn.Module,
    *,
    calls: PipelineCall | Sequence[PipelineCall],
    progress: Progress = no_progress,
) -> Trajectories:
    """Make calls of a pipeline and return the path of its denoiser's inputs and outputs.

    Args:
        model: A pipeline, or the denoiser itself.
        calls: One or more functions that run the model, as for `calibrate`. `Sampler.calls` and
            `prompt_calls` return such functions. All must take the same steps, with samples and
            conditions of the same size.
        progress: Called after each call.

    Returns:
        The path. The rows of later calls follow those of earlier calls.

    Raises:
        InputError: If the calls differ in their steps, sizes or other conditions, or a forward call
            has no timestep or more than one.

    Example:
        >>> from msfp import Sampler, reference_pipeline
        >>> calls = Sampler(2, batch=4).calls(8, seed=0)
        >>> paths = record_trajectories(reference_pipeline(), calls=calls)
        >>> paths.timesteps.tolist(), tuple(paths.samples.shape)
        ([999, 499], (2, 8, 1, 16, 16))
    """
    return Recording(calls).trajectories(model, progress)


def _trajectories(batches: list[list[_Forward]]) -> Trajectories:
    """Return the path of the recorded forwards of all calls."""
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
    """Return the tensors of all calls and steps as one tensor of shape (steps, rows, ...)."""
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
    """Merge the values of one argument over all calls and steps.

    Args:
        values: The value at each call and step.
        rows: Number of samples of each call.
        name: Name of the argument in error messages.
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
    """Merge dictionaries or lists item by item."""
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
    """Return whether two arguments are equal; tensors are equal if all their values are."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(one == other)
