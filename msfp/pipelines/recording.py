"""Recording a denoiser's inputs and outputs while its pipeline samples."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.pipelines.denoiser import denoiser_of, timestep_or_none
from msfp.pipelines.forward_files import load_forwards, save_forwards
from msfp.pipelines.sampler import PipelineCall, check_calls
from msfp.pipelines.trajectories import (
    Arguments,
    RowCondition,
    Trajectories,
    WholeForwards,
    as_vector,
)
from msfp.support.hooks import hooked
from msfp.support.progress import Progress, counted, no_progress, shown_progress
from msfp.support.trees import Copies, mapped, tensors_in

FEW_ROWS = 3
"""Rows of a forward from which on only a single row is tried, and not one more, too."""
JOINED_ERRORS = {True: 1e-3, False: 0.05}
"""Largest relative error of joined rows against the recorded ones, in wide dtypes and in others."""


@dataclass(frozen=True)
class _Forward:
    """One recorded forward call.

    Attributes:
        arguments: Its positional and keyword arguments.
        bound: The same arguments by the names of the forward's parameters.
        timesteps: One value for each sample, or one for all; None if the call had no timestep.
        output: What it returned.
    """

    arguments: Arguments
    bound: dict[str, Any]
    timesteps: torch.Tensor | None
    output: Any

    @property
    def time(self) -> float | None:
        """The timestep of the call, of the first sample if there are several."""
        return None if self.timesteps is None else self.timesteps[0].item()

    @property
    def timed(self) -> bool:
        """Whether the argument `timestep` is one number for all samples."""
        given = self.bound.get("timestep")
        if self.timesteps is None or not isinstance(given, torch.Tensor | int | float):
            return False
        few = not isinstance(given, torch.Tensor) or given.dim() < 2
        return few and not bool((self.timesteps != self.timesteps[0]).any())

    @property
    def first(self) -> str:
        """The name of the first argument."""
        return next(iter(self.bound))


class _Recorder:
    """Hooks of a denoiser that record its forward calls."""

    def __init__(self) -> None:
        self.forwards: list[_Forward] = []
        self._copies = Copies()
        self._given: list[Arguments] = []

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the arguments, before the forward can change them."""
        self._given.append((mapped(args, self._copies.of), mapped(kwargs, self._copies.of)))

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Copy the output."""
        del args, kwargs
        args, kwargs = self._given.pop()
        output = mapped(output, lambda x: x.detach().clone())
        self.forwards.append(_forward(module, args, kwargs, output))


def _forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> _Forward:
    """Return a forward call of a module."""
    bound = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    return _Forward((args, kwargs), bound, timestep_or_none(module, args, kwargs), output)


@contextmanager
def recorded(denoiser: nn.Module) -> Iterator[list[_Forward]]:
    """Record every forward call of a denoiser inside the block."""
    recorder = _Recorder()
    hooks = [
        denoiser.register_forward_pre_hook(recorder.before, with_kwargs=True),
        denoiser.register_forward_hook(recorder.after, with_kwargs=True),
    ]
    with hooked(hooks):
        yield recorder.forwards


class Recording:
    """Records the path of a denoiser's inputs and outputs while another function makes the calls.

    Args:
        calls: One or more functions that run the model, as for `record_trajectories`.
        folder: A folder that keeps the recordings, so that calls need not be made again; or None.
        fingerprint: Facts that must be equal for recordings in the folder to be used.

    Attributes:
        calls: The same functions, with recording added.

    Example:
        >>> from msfp import Sampler, calibrate, reference_pipeline
        >>> pipe, recording = reference_pipeline(), Recording(Sampler(2, batch=4).calls(8, seed=0))
        >>> calibration = calibrate(pipe, calls=recording.calls)
        >>> tuple(recording.trajectories(pipe).samples.shape)  # without a further call
        (2, 8, 1, 16, 16)
    """

    def __init__(
        self,
        calls: PipelineCall | Sequence[PipelineCall],
        folder: Path | None = None,
        fingerprint: dict[str, Any] | None = None,
    ) -> None:
        given = check_calls("calls", calls)
        self.calls = [self._recorded(index, call) for index, call in enumerate(given)]
        self._forwards: dict[int, list[_Forward]] = {}
        self._folder, self._fingerprint = folder, {"calls": len(given)} | (fingerprint or {})

    def _recorded(self, index: int, call: PipelineCall) -> PipelineCall:
        def make(model: DiffusionPipeline | nn.Module) -> None:
            with recorded(denoiser_of(model)) as forwards, torch.no_grad():
                call(model)
            self._forwards[index] = forwards
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                calls = [(*each.arguments, each.output) for each in forwards]
                kept = save_forwards(self._file(index), calls, self._fingerprint | {"call": index})
                if not kept:
                    warnings.warn(
                        "calls are not kept in the state folder, and are made again when the run "
                        "resumes: their arguments are more than tensors and plain values",
                        stacklevel=2,
                    )

        return make

    def _file(self, index: int) -> Path:
        return (self._folder or Path()) / f"{index:05}.safetensors"

    def read(self, denoiser: nn.Module) -> None:
        """Read the recordings in the folder, of calls that were not made.

        Raises:
            InputError: If they are those of another run.
        """
        for index in range(len(self.calls)):
            if self._folder is None or index in self._forwards or not self._file(index).exists():
                continue
            calls = load_forwards(self._file(index), self._fingerprint | {"call": index})
            self._forwards[index] = [_forward(denoiser, *call) for call in calls]

    def trajectories(
        self, model: DiffusionPipeline | nn.Module, progress: Progress = no_progress
    ) -> Trajectories:
        """Make the remaining calls and return the path, as `record_trajectories` does.

        The recordings of the single calls are then released.
        """
        self.read(denoiser_of(model))
        missing = [call for index, call in enumerate(self.calls) if index not in self._forwards]
        done = counted(progress, "recording", len(missing))
        for call in missing:
            call(model)
            done(1)
        batches = [self._forwards.pop(index) for index in range(len(self.calls))]
        return _trajectories(denoiser_of(model), batches)


def record_trajectories(
    model: DiffusionPipeline | nn.Module,
    *,
    calls: PipelineCall | Sequence[PipelineCall],
    progress: Progress = shown_progress,
) -> Trajectories:
    """Make calls of a pipeline and return the path of its denoiser's inputs and outputs.

    Args:
        model: A pipeline, or the denoiser itself.
        calls: One or more functions that run the model, as for `calibrate`. `Sampler.calls` and
            `prompt_calls` return such functions. All must take the same steps.
        progress: Called after each call.

    Returns:
        The path. The rows of later calls follow those of earlier calls. If samples of a call cannot
        be taken apart and put together with those of others, which is tried with two rows, each
        forward is one row: `WholeForwards`, which predict slower, one by one.

    Raises:
        InputError: If the calls differ in their steps, or do not run the denoiser.

    Example:
        >>> from msfp import Sampler, reference_pipeline
        >>> calls = Sampler(2, batch=4).calls(8, seed=0)
        >>> paths = record_trajectories(reference_pipeline(), calls=calls)
        >>> paths.timesteps.tolist(), tuple(paths.samples.shape)
        ([999, 499], (2, 8, 1, 16, 16))
    """
    return Recording(calls).trajectories(model, progress)


def _trajectories(denoiser: nn.Module, batches: list[list[_Forward]]) -> Trajectories:
    """Return the path of the recorded forwards of all calls."""
    if not batches or not batches[0]:
        raise InputError("calls must run the denoiser at least once")
    steps = [[forward.time for forward in forwards] for forwards in batches]
    if any(each != steps[0] for each in steps):
        raise InputError("all calls must take the sampler through the same timesteps")
    first = batches[0]
    times = [-float(i) if forward.time is None else forward.time for i, forward in enumerate(first)]
    known = [forward.timesteps[0] for forward in first if forward.timesteps is not None]
    timesteps = torch.stack(known) if len(known) == len(first) else torch.tensor(times)
    try:
        joined = _joined(timesteps, batches)
        _check_joined(denoiser, joined, len(first[0].bound[first[0].first]))
    except (InputError, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return _whole(timesteps, batches)
    return joined


def _joined(timesteps: torch.Tensor, batches: list[list[_Forward]]) -> Trajectories:
    """Return a path with a row for each sample; raise InputError if there is none."""
    forwards = [forward for steps in batches for forward in steps]
    timed = all(forward.timed for forward in forwards)
    samples, predictions = [], []
    for steps in batches:
        samples.append([forward.bound[forward.first] for forward in steps])
        predictions.append([_one_tensor(forward.output) for forward in steps])
    if not all(isinstance(each, torch.Tensor) for steps in samples for each in steps):
        raise InputError("the first argument must be a tensor")
    rows = [len(steps[0]) for steps in samples]
    if any(len(y) != n for steps, n in zip(predictions, rows, strict=True) for y in steps):
        raise InputError("the output must have a row for each sample")
    left_out = {forwards[0].first, "return_dict", *(["timestep"] if timed else [])}
    trees = [
        [{k: v for k, v in forward.bound.items() if k not in left_out} for forward in steps]
        for steps in batches
    ]
    conditions: dict[str, Any] = _merge(trees, rows, "conditions")
    return Trajectories(
        timesteps, _table(samples, "sample"), _table(predictions, "output"), conditions, timed
    )


def _one_tensor(output: Any) -> torch.Tensor:
    """Return the only tensor of an output; raise InputError if there are more, or none."""
    found = list(tensors_in(output))
    if len(found) != 1:
        raise InputError(f"the output has {len(found)} tensors")
    return found[0]


@torch.no_grad()
def _check_joined(denoiser: nn.Module, path: Trajectories, rows: int) -> None:
    """Raise InputError unless rows of several steps, joined, give the recorded predictions.

    They are more or fewer than those of a recorded forward. This finds tensors whose first
    dimension has the length of the rows by chance.
    """
    wide = path.predictions.dtype in (torch.float32, torch.float64)
    for count in (1, rows + 1) if rows < FEW_ROWS else (1,):
        index = torch.arange(count)
        step = (len(path.timesteps) - 1 - index) % len(path.timesteps)
        row = (path.samples.shape[1] - 1 - index) % path.samples.shape[1]
        recorded = path.predictions[step, row].double()
        error = (path.predict(denoiser, step, row).double() - recorded).square().sum()
        if not error <= JOINED_ERRORS[wide] ** 2 * recorded.square().sum():
            raise InputError("joined rows have other predictions than the recorded ones")


def _whole(timesteps: torch.Tensor, batches: list[list[_Forward]]) -> WholeForwards:
    """Return the path whose rows are whole forwards."""
    steps = list(zip(*batches, strict=True))
    inputs = [[as_vector(each.bound[each.first]) for each in forwards] for forwards in steps]
    outputs = [[as_vector(each.output) for each in forwards] for forwards in steps]
    return WholeForwards(
        timesteps,
        _padded(inputs),
        _padded(outputs),
        arguments=tuple(tuple(each.arguments for each in forwards) for forwards in steps),
    )


def _padded(vectors: list[list[torch.Tensor]]) -> torch.Tensor:
    """Return vectors of any lengths as one tensor, with zeros at the ends."""
    longest = max(len(each) for row in vectors for each in row)
    return torch.stack([torch.stack([as_vector(each, longest) for each in row]) for row in vectors])


def _table(batches: Sequence[Sequence[torch.Tensor]], name: str) -> torch.Tensor:
    """Return the tensors of all calls and steps as one tensor of shape (steps, rows, ...)."""
    shapes = {tuple(each.shape[1:]) for steps in batches for each in steps}
    if len(shapes) > 1:
        raise InputError(f"all calls must have {name} of one size, not {sorted(shapes)}")
    return torch.cat([torch.stack(list(steps)) for steps in batches], dim=1)


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
