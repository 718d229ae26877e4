"""Histograms of the input of each layer, which can be merged and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from fpformats import Histogram
from msfp.errors import InputError
from msfp.support.container import FileKind, Header, read, write


def _without_version(header: Header) -> Header:
    """Convert the header of a version 1 calibration, which stored the version among the facts."""
    facts = {key: value for key, value in header.facts.items() if key != "format_version"}
    return Header({}, {"description": {}} | facts)


KIND = FileKind("a calibration", first_key="msfp_calibration", migrations={1: _without_version})
SHORT = 60
"""Length of the longest value that an error message shows in full, in characters."""
SHARED = (
    "activations", "timesteps", "calls", "sample_path", "readers", "writers", "multiply_adds",
)  # fmt: skip
"""Attributes that processes send each other as they are."""


@dataclass
class Calibration:
    """A histogram of the input of each layer, over all calls that have run.

    The calls can be split between two calibrations of one denoiser. Merging these gives the same
    result, bit for bit, as one calibration with all calls.

    Attributes:
        inputs: A histogram of the input of each layer, in the order in which layers first ran.
            Layers that never ran come last; their histograms are empty.
        activations: The activation function that computed a layer's input. Layers without one are
            absent.
        timesteps: Number of calls of the denoiser at each timestep, in descending order of
            timesteps. Empty if the network has no timesteps.
        weights: Weights of the timesteps, or None if they are not weighted.
        calls: Indices of the pipeline calls that have run, ascending.
        total: Number of calls of the complete calibration.
        description: What the calls do, such as their prompts and seed, as plain JSON types by
            name. Empty if unknown.
        sample_path: The layers whose input depends on the denoiser's noisy sample, in the order in
            which they ran. Empty if unknown.
        readers: Those of them that read the sample itself. Empty if unknown.
        writers: Those of them that write the prediction. Empty if unknown.
        multiply_adds: Number of multiply-adds of the first forward, by the name of the weight; ""
            for products of activations, as in attention. Empty if unknown.
    """

    inputs: dict[str, Histogram]
    activations: dict[str, str] = field(default_factory=dict)
    timesteps: dict[float, int] = field(default_factory=dict)
    weights: dict[float, int] | None = None
    calls: list[int] = field(default_factory=list)
    total: int = 0
    description: dict[str, Any] = field(default_factory=dict)
    sample_path: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    multiply_adds: dict[str, int] = field(default_factory=dict)

    @property
    def ran(self) -> list[str]:
        """The layers that ran, in the order in which they first ran."""
        return [
            name
            for name, histogram in self.inputs.items()
            if histogram.count or histogram.nonfinite
        ]

    def check_same(self, other: Calibration) -> None:
        """Raise InputError unless another calibration has the same layers, weights and calls."""
        unlike = self.inputs.keys() ^ other.inputs.keys()
        if unlike:
            raise InputError(
                "the calibrations are of different denoisers: only one of them has layer "
                f"{min(unlike)!r}"
            )
        if other.weights != self.weights:
            raise InputError("the calibrations weigh timesteps differently")
        if other.total != self.total:
            raise InputError(
                f"the calibrations are of different calls: {self.total} and {other.total} calls"
            )
        for name in self.description | other.description:
            mine, theirs = (each.description.get(name) for each in (self, other))
            if mine != theirs:
                values = f"{_short(mine)} and {_short(theirs)}"
                raise InputError(f"the calibrations are of different calls: {name} {values}")

    def merge(self, other: Calibration) -> None:
        """Add the calls of another calibration.

        Raises:
            InputError: If the layers, the weights, the number of calls or their description
                differ, or a call is in both calibrations.
        """
        self.check_same(other)
        both = set(self.calls) & set(other.calls)
        if both:
            raise InputError(f"call {min(both)} is in both calibrations, and would count twice")
        # The calibration with the earliest call determines the order of layers.
        first, second = sorted((self, other), key=lambda each: each.calls[:1] or [each.total])
        added = {name: self.inputs[name] + other.inputs[name] for name in first.inputs}
        timesteps = {
            timestep: self.timesteps.get(timestep, 0) + other.timesteps.get(timestep, 0)
            for timestep in sorted(self.timesteps | other.timesteps, reverse=True)
        }
        # One update for all fields: an interrupt leaves the call in every layer or in none.
        vars(self).update(
            inputs=added,
            activations=second.activations | first.activations,
            timesteps=timesteps,
            calls=sorted(self.calls + other.calls),
            sample_path=first.sample_path or second.sample_path,
            readers=first.readers or second.readers,
            writers=first.writers or second.writers,
            multiply_adds=first.multiply_adds or second.multiply_adds,
        )

    def all_reduce(self) -> None:
        """Merge the calibrations of all torch.distributed processes, in every process."""
        facts: list[Any] = [None] * dist.get_world_size()
        names = list(self.inputs)
        own = {key: getattr(self, key) for key in SHARED} | {"order": names}
        dist.all_gather_object(facts, own)
        merged = self._empty(names)
        for each in facts:
            part = self._empty(each.pop("order"))
            vars(part).update(each)
            merged.merge(part)
        for name in sorted(names):
            self.inputs[name].all_reduce()
        merged.inputs = {name: self.inputs[name] for name in merged.inputs}
        vars(self).update(vars(merged))

    def _empty(self, names: list[str]) -> Calibration:
        """Return a calibration like this one, before any call."""
        inputs = {name: Histogram() for name in names}
        return Calibration(
            inputs, weights=self.weights, total=self.total, description=self.description
        )

    def save(self, file: str | Path) -> None:
        """Write a safetensors file atomically.

        Raises:
            InputError: If the file cannot be written.
        """
        tensors = {
            f"{name}.{key}": torch.from_numpy(array)
            for name, histogram in self.inputs.items()
            for key, array in histogram.state().items()
        }
        facts = {
            "layers": list(self.inputs),
            "activations": self.activations,
            "timesteps": list(self.timesteps.items()),
            "weights": None if self.weights is None else list(self.weights.items()),
            "calls": self.calls,
            "total": self.total,
            "description": self.description,
            "sample_path": self.sample_path,
            "readers": self.readers,
            "writers": self.writers,
            "multiply_adds": self.multiply_adds,
        }
        write(Path(file), KIND, tensors, facts)

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            InputError: If the file cannot be read, or is not a complete calibration of a version
                that this msfp reads.
        """
        header, tensors = read(Path(file), KIND)
        try:
            return cls._from(header.facts, tensors)
        except (LookupError, ValueError, TypeError) as error:
            raise InputError(f"{file} cannot be read as {KIND.name}: {error}") from error

    @classmethod
    def _from(cls, facts: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        weights = facts["weights"]
        return cls(
            inputs={name: _histogram(name, tensors) for name in facts["layers"]},
            activations=facts["activations"],
            timesteps=dict(facts["timesteps"]),
            weights=None if weights is None else dict(weights),
            calls=facts["calls"],
            total=facts["total"],
            description=facts["description"],
            sample_path=facts.get("sample_path", []),
            readers=facts.get("readers", []),
            writers=facts.get("writers", []),
            multiply_adds=facts.get("multiply_adds", {}),
        )


def _short(value: Any) -> str:
    """Return a value as text, without the middle if it is long."""
    text = "none" if value is None else str(value)
    return text if len(text) <= SHORT else f"{text[: SHORT // 2]}...{text[-SHORT // 2 :]}"


def _histogram(name: str, tensors: Mapping[str, torch.Tensor]) -> Histogram:
    """Return the histogram of a layer."""
    return Histogram.from_state(
        {key: tensors[f"{name}.{key}"].numpy() for key in Histogram().state()}
    )
