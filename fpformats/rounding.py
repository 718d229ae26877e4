"""Rounding and saturation modes, under the names that IEEE P3109 gives them."""

from __future__ import annotations

from enum import StrEnum


class Rounding(StrEnum):
    """How a value between two neighbours of the format is decided (IEEE P3109, 4.6.2)."""

    NearestTiesToEven = "NearestTiesToEven"
    """The nearer neighbour; exactly halfway, the neighbour whose code is even."""


class Saturation(StrEnum):
    """What a value beyond the format's range becomes, after rounding (IEEE P3109, 4.6.3)."""

    SatFinite = "SatFinite"
    """The nearest finite value of the format, for infinities too."""


def check_policy(rounding: str, saturation: str, random: object) -> None:
    """Check that the named policy is one that this library carries.

    Args:
        rounding: The name of a member of `Rounding`.
        saturation: The name of a member of `Saturation`.
        random: The random words of stochastic rounding; None for the modes that use none.

    Raises:
        ValueError: If a name is unknown, or random words are given to a mode that uses none.
    """
    _check_member("rounding", rounding, Rounding)
    _check_member("saturation", saturation, Saturation)
    if random is not None:
        raise ValueError(f"random must be None: {rounding} uses no random words")


def _check_member(argument: str, name: str, modes: type[StrEnum]) -> None:
    allowed = [mode.value for mode in modes]
    if name not in allowed:
        raise ValueError(f"{argument} is {name!r}; allowed: {', '.join(allowed)}")
