"""Rounding and saturation modes, under the names that IEEE P3109 gives them."""

from __future__ import annotations

from enum import StrEnum


class Rounding(StrEnum):
    """How a value between two neighbours of the format is decided (IEEE P3109, 4.6.2).

    "Even" and "odd" are those of the neighbour's code. In the stochastic modes v is the distance
    from the neighbour nearer zero, in units of the gap, and R is a random word of N bits.
    """

    NearestTiesToEven = "NearestTiesToEven"
    """The nearer neighbour; exactly halfway, the one whose code is even."""

    NearestTiesToAway = "NearestTiesToAway"
    """The nearer neighbour; exactly halfway, the one farther from zero."""

    TowardZero = "TowardZero"
    """The neighbour nearer zero."""

    TowardPositive = "TowardPositive"
    """The greater neighbour."""

    TowardNegative = "TowardNegative"
    """The lesser neighbour."""

    ToOdd = "ToOdd"
    """The neighbour whose code is odd."""

    StochasticA = "StochasticA"
    """Away from zero where floor(v * 2**N) + R >= 2**N."""

    StochasticB = "StochasticB"
    """Away from zero where floor(v * 2**(N+1)) + 2 * R + 1 >= 2**(N+1)."""

    StochasticC = "StochasticC"
    """Away from zero where v * 2**N, rounded to an integer with ties to even, + R >= 2**N."""


class Saturation(StrEnum):
    """What a value beyond the format's range becomes, after rounding (IEEE P3109, 4.6.3).

    A result of zero in a format without zero is beyond the range too.
    """

    SatFinite = "SatFinite"
    """The nearest finite value of the format, for infinities too."""

    SatPropagate = "SatPropagate"
    """As SatFinite, but infinities stay infinite in a format that has them."""

    SatNone = "SatNone"
    """Infinity in a format that has it, else the nearest finite value; below an unsigned format,
    NaN. Modes that round toward the range stay in it, as in IEEE 754."""

    OverflowNaN = "OverflowNaN"
    """As SatNone, with NaN in place of a missing infinity: OCP OFP8's non-saturating mode."""


NEAREST = "NearestTiesToEven"
FINITE = "SatFinite"
MAX_RANDOM_BITS = 32


def is_stochastic(rounding: str) -> bool:
    """Tell whether a mode, by its name, uses random words."""
    return rounding.startswith("Stochastic")


def check_policy(rounding: str, saturation: str, random: object, random_bits: int) -> None:
    """Check the names of a policy and that random words are given exactly where they are used.

    Args:
        rounding: The name of a member of `Rounding`.
        saturation: The name of a member of `Saturation`.
        random: The seed or the random words of stochastic rounding; None for the other modes.
        random_bits: Width of the random words, 1 to 32.

    Raises:
        ValueError: If a name is unknown, random words are missing or not used, or the width is
            out of range.
    """
    _check_member("rounding", rounding, Rounding)
    _check_member("saturation", saturation, Saturation)
    if is_stochastic(rounding) and random is None:
        raise ValueError(f"random is None; {rounding} needs a seed or an array of random words")
    if not is_stochastic(rounding) and random is not None:
        raise ValueError(f"random must be None: {rounding} uses no random words")
    if type(random_bits) is not int or not 1 <= random_bits <= MAX_RANDOM_BITS:
        raise ValueError(
            f"random_bits is {random_bits!r}; it must be an integer from 1 to {MAX_RANDOM_BITS}"
        )


def _check_member(argument: str, name: str, modes: type[StrEnum]) -> None:
    allowed = [mode.value for mode in modes]
    if name not in allowed:
        raise ValueError(f"{argument} is {name!r}; allowed: {', '.join(allowed)}")
