"""What calibration saw at the input of each layer: histograms that add up and can be saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fpformats.fitting.histogram import Histogram
from msfp.errors import InputError
from msfp.support.files import atomic_file

FORMAT_VERSION = 1
KEY = "msfp_calibration"
"""Key of the JSON in the metadata of the file."""
SHORT = 60
"""Characters of a value that are shown."""


@dataclass
class Calibration:
    """What the input of each layer looked like, over all calls that were made.

    Two calibrations of one denoiser, by calls that were shared out between them, merge into that
    of all calls, bit for bit.

    Attributes:
        inputs: For each layer a histogram of its input, in the order in which layers first ran.
            Layers that never ran come last; their histograms are empty.
        activations: The activation function that computed a layer's input, where there is one.
        timesteps: How often the denoiser was called at each timestep, where it has any;
            descending.
        weights: Of the timesteps, where they are weighted.
        calls: Numbers of the pipeline calls that were made, ascending.
        total: How many there are to make.
        description: What these calls do, such as their prompts and seed, as plain JSON types by
            name; empty where that is not known.
    """

    inputs: dict[str, Histogram]
    activations: dict[str, str] = field(default_factory=dict)
    timesteps: dict[float, int] = field(default_factory=dict)
    weights: dict[float, int] | None = None
    calls: list[int] = field(default_factory=list)
    total: int = 0
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def ran(self) -> list[str]:
        """The layers that ran, in the order in which they first did."""
        return [
            name
            for name, histogram in self.inputs.items()
            if histogram.count or histogram.nonfinite
        ]

    def check_same(self, other: Calibration) -> None:
        """Raise InputError unless another calibration has these layers, weights and calls."""
        unlike = self.inputs.keys() ^ other.inputs.keys()
        if unlike:
            raise InputError(
                "the calibrations are of different denoisers: one alone has a layer "
                f"{min(unlike)!r}"
            )
        if other.weights != self.weights:
            raise InputError("the calibrations weigh timesteps differently")
        if other.total != self.total:
            raise InputError(
                f"the calibrations are by different calls: {self.total} and {other.total} of them"
            )
        for name in self.description | other.description:
            mine, theirs = (each.description.get(name) for each in (self, other))
            if mine != theirs:
                values = f"{_short(mine)} and {_short(theirs)}"
                raise InputError(f"the calibrations are by different calls: {name} {values}")

    def merge(self, other: Calibration) -> None:
        """Add the calls of another calibration.

        Raises:
            InputError: If it has other layers, weights or calls, or a call is in both.
        """
        self.check_same(other)
        both = set(self.calls) & set(other.calls)
        if both:
            raise InputError(f"call {min(both)} is in both calibrations, and would count twice")
        # The order of layers is that of the first call of all.
        first, second = sorted((self, other), key=lambda each: each.calls[:1] or [each.total])
        added = {name: self.inputs[name] + other.inputs[name] for name in first.inputs}
        timesteps = {
            timestep: self.timesteps.get(timestep, 0) + other.timesteps.get(timestep, 0)
            for timestep in sorted(self.timesteps | other.timesteps, reverse=True)
        }
        # All at once, so that an interrupt leaves the call in every layer or in none.
        vars(self).update(
            inputs=added,
            activations=second.activations | first.activations,
            timesteps=timesteps,
            calls=sorted(self.calls + other.calls),
        )

    def all_reduce(self) -> None:
        """Merge, in every process of torch.distributed, the calibrations of all of them."""
        facts: list[Any] = [None] * dist.get_world_size()
        names = list(self.inputs)
        dist.all_gather_object(facts, (names, self.activations, self.timesteps, self.calls))
        merged = self._empty(names)
        for order, activations, timesteps, calls in facts:
            part = self._empty(order)
            part.activations, part.timesteps, part.calls = activations, timesteps, calls
            merged.merge(part)
        for name in sorted(names):
            self.inputs[name].all_reduce()
        merged.inputs = {name: self.inputs[name] for name in merged.inputs}
        vars(self).update(vars(merged))

    def _empty(self, names: list[str]) -> Calibration:
        """Return a calibration like this one, of which no call was made."""
        inputs = {name: Histogram() for name in names}
        return Calibration(
            inputs, weights=self.weights, total=self.total, description=self.description
        )

    def save(self, file: str | Path) -> None:
        """Write a safetensors file, of which others never see a part.

        Raises:
            InputError: If the file cannot be written.
        """
        file = Path(file)
        tensors = {
            f"{name}.{key}": array
            for name, histogram in self.inputs.items()
            for key, array in histogram.state().items()
        }
        description = {
            "format_version": FORMAT_VERSION,
            "layers": list(self.inputs),
            "activations": self.activations,
            "timesteps": list(self.timesteps.items()),
            "weights": None if self.weights is None else list(self.weights.items()),
            "calls": self.calls,
            "total": self.total,
            "description": self.description,
        }
        try:
            with atomic_file(file) as partial:
                save_file(tensors, partial, metadata={KEY: json.dumps(description)})
        except (OSError, SafetensorError) as error:
            raise InputError(f"calibration {file} cannot be written: {error}") from error

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: If the file cannot be read, or is no whole calibration of this version.
        """
        try:
            with safe_open(file, framework="np") as opened:
                text = (opened.metadata() or {}).get(KEY)
                if text is None:
                    raise InputError(f"{file} is a safetensors file, but not of a calibration")
                description = json.loads(text)
                version = description.get("format_version")
                if version != FORMAT_VERSION:
                    raise InputError(
                        f"calibration {file} has format version {version}, this msfp reads "
                        f"{FORMAT_VERSION}"
                    )
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return cls._from(description, tensors)
        except InputError:
            raise
        except (OSError, SafetensorError, LookupError, ValueError, TypeError) as error:
            raise InputError(f"calibration {file} cannot be read: {error}") from error

    @classmethod
    def _from(cls, description: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        weights = description["weights"]
        return cls(
            inputs={name: _histogram(name, tensors) for name in description["layers"]},
            activations=description["activations"],
            timesteps=dict(description["timesteps"]),
            weights=None if weights is None else dict(weights),
            calls=description["calls"],
            total=description["total"],
            description=description.get("description", {}),
        )


def _short(value: Any) -> str:
    """Return a value as text, the middle of a long one left out."""
    text = "none" if value is None else str(value)
    return text if len(text) <= SHORT else f"{text[: SHORT // 2]}...{text[-SHORT // 2 :]}"


def _histogram(name: str, tensors: Mapping[str, np.ndarray]) -> Histogram:
    """Return the histogram of a layer."""
    return Histogram.from_state({key: tensors[f"{name}.{key}"] for key in Histogram().state()})
