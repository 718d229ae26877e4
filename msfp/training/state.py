"""The state that a training run needs to resume, in one safetensors file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msfp.errors import InputError
from msfp.support.autosave import run_as_fingerprint
from msfp.support.container import FileKind, Header, Named, check_fingerprint, read, write
from msfp.training.config import options_of_version_1


def _first_fingerprint(header: Header) -> Header:
    """Convert the header of a version 1 state, whose options had other names."""
    told = run_as_fingerprint(header)
    return told._replace(fingerprint=options_of_version_1(told.fingerprint))


STATE = FileKind(
    "a state of fine-tuning",
    first_key="a state of fine-tuning",
    migrations={1: _first_fingerprint},
)


@dataclass
class History:
    """The losses and held-out errors of a training run.

    Attributes:
        losses: The loss of each step.
        errors: The errors on held-out trajectories, by the number of steps taken before.
    """

    losses: list[float] = field(default_factory=list)
    errors: dict[int, float] = field(default_factory=dict)

    @property
    def best(self) -> int | None:
        """The number of steps with the lowest error, or None if no error was measured."""
        return min(self.errors, key=lambda step: self.errors[step], default=None)

    def evaluations_since_best(self) -> int:
        """Return the number of errors measured after the lowest one."""
        return sum(step > (self.best or 0) for step in self.errors)


class TrainingState:
    """The state that training changes.

    Args:
        parameters: The trained parameters, by name.
        optimizer: Their optimizer.
        generator: Random generator of the batches.
        fingerprint: The values that must be equal for a run to resume, as plain JSON types.

    Attributes:
        history: The losses and held-out errors so far.
        average: Moving averages of the parameters; empty if there are none.
        best: The parameters with the lowest held-out error; empty before the first evaluation.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        fingerprint: dict[str, Any],
    ) -> None:
        self.parameters, self.optimizer, self.generator = parameters, optimizer, generator
        self.fingerprint = fingerprint
        self.history = History()
        self.average: Named = {}
        self.best: Named = {}

    @property
    def step(self) -> int:
        """The number of steps taken so far."""
        return len(self.history.losses)

    def current(self) -> Named:
        """Return copies of the parameters, or of their averages where there are any."""
        source = self.average or self.parameters
        return {name: value.detach().clone() for name, value in source.items()}

    @torch.no_grad()
    def put(self, values: Named) -> None:
        """Set the parameters to given values."""
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def _parts(self) -> dict[str, Named]:
        """Return all tensors of the state, grouped by kind."""
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizer": moments,
            "average": self.average,
            "best": self.best,
            "generator": {"state": self.generator.get_state()},
        }

    def save(self, file: Path, **facts: Any) -> None:
        """Write the state to a file atomically.

        A process killed at any moment leaves the old file or the new one.

        Args:
            file: A safetensors file, which may exist.
            **facts: Other facts to write, as plain JSON types.
        """
        tensors = {
            f"{part}/{name}": value
            for part, named in self._parts().items()
            for name, value in named.items()
        }
        history = {
            "losses": self.history.losses,
            "errors": {str(step): error for step, error in self.history.errors.items()},
        }
        write(file, STATE, tensors, history | facts, self.fingerprint)

    def load(self, file: Path) -> dict[str, Any]:
        """Restore the state from a file, and return the facts in it.

        Raises:
            InputError: If the file is not a state, or is the state of another run.
        """
        _, facts = check_fingerprint(file, STATE, self.fingerprint)
        errors = {int(step): error for step, error in facts["errors"].items()}
        self.history = History(facts["losses"], errors)
        parts: dict[str, Named] = {}
        for key, tensor in read(file, STATE)[1].items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        _check_alike(file, parts["parameters"], self.parameters)
        self.put(parts["parameters"])
        for key, moment in parts["optimizer"].items():
            name, _, leaf = key.rpartition("/")
            parameter = self.parameters[name]
            self.optimizer.state[parameter][leaf] = moment.to(parameter.device)
        self.generator.set_state(parts["generator"]["state"])
        place = _on(next(iter(self.parameters.values())).device)
        self.average = place(parts.get("average", {}))
        self.best = place(parts.get("best", {}))
        return facts


def _on(device: torch.device) -> Callable[[Named], Named]:
    """Return a function that moves tensors to a device."""
    return lambda named: {name: value.to(device) for name, value in named.items()}


def _check_alike(file: Path, saved: Named, parameters: dict[str, nn.Parameter]) -> None:
    """Raise InputError unless a saved state has the trained parameters, with the same shapes."""
    for name in sorted(saved.keys() | parameters.keys()):
        one, other = (
            tuple(each[name].shape) if name in each else "absent" for each in (saved, parameters)
        )
        if one != other:
            raise InputError(
                f"{file} is the state of another run: its {name} is {one}, not {other}"
            )
