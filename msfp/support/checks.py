"""Checks of arguments: one sentence with the name, the value given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msfp.errors import InputError

MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
"""Range of seeds that torch's generators accept."""


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise InputError unless a value is a number in a range; bools are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a number, not {value!r}")
    _check_between(name, value, low, high)


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise InputError unless a value is an int, as in JSON, in a range; bools are not ints."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be a whole number, not {value!r}")
    if high is None:
        if value < low:
            raise InputError(f"{name} must be at least {low}, not {value}")
        return
    _check_between(name, value, low, high)


def _check_between(name: str, value: Any, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{name} must be between {low} and {high}, not {value}")


def check_truth(name: str, value: Any) -> None:
    """Raise InputError unless a value is True or False."""
    if value is not True and value is not False:
        raise InputError(f"{name} must be True or False, not {value!r}")


def check_choice(name: str, value: Any, allowed: Iterable[str | int | None]) -> None:
    """Raise InputError unless a value is one of the allowed values."""
    if value not in tuple(allowed):
        raise InputError(f"{name} must be one of {tuple(allowed)}, not {value!r}")


def check_type(name: str, value: object, allowed: type) -> None:
    """Raise InputError unless a value is an instance of a class."""
    if not isinstance(value, allowed):
        given = type(value).__name__
        raise InputError(f"{name} must be of the type {allowed.__name__}, not {given}")


def check_callable(name: str, value: object) -> None:
    """Raise InputError unless a value is a function."""
    if not callable(value):
        raise InputError(f"{name} must be a function, not {value!r}")


def check_path(name: str, value: object) -> Path:
    """Return a path; raise InputError unless a value is one, or a string."""
    if not isinstance(value, str | Path):
        raise InputError(f"{name} must be a path, not {value!r}")
    return Path(value)


def check_seed(value: object) -> None:
    """Raise InputError unless a value is a seed that torch's generators accept."""
    check_whole("seed", value, MIN_SEED, MAX_SEED)


def check_factors(factors: object) -> None:
    """Raise InputError unless a value is a table of numbers by timestep."""
    if not isinstance(factors, Mapping):
        raise InputError(f"factors must be numbers by timestep, not {factors!r}")
    for value in [*factors, *factors.values()]:
        check_number("factors", value, -math.inf, math.inf)


def check_names(name: str, value: Any) -> tuple[str, ...]:
    """Return names or globs as a tuple; raise InputError unless they are a sequence of strings."""
    listed = isinstance(value, Iterable) and not isinstance(value, str)
    if not listed or not all(isinstance(each, str) for each in value):
        raise InputError(f"{name} must be a list of names or globs, not {value!r}")
    return tuple(value)


def check_keys(name: str, table: Any, known: Iterable[str]) -> None:
    """Raise InputError unless a value is a table with only known keys."""
    if not isinstance(table, Mapping):
        raise InputError(f"{name} must be a table, not {table!r}")
    unknown = table.keys() - set(known)
    if unknown:
        raise InputError(f"{name} has no {min(unknown)!r}: it may have {', '.join(known)}")
