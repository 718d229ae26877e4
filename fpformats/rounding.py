"""Rounding and saturation modes, under the names that IEEE P3109 gives them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple


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


class Policy(NamedTuple):
    """How to round: modes by name, and the random words that stochastic ones take.

    Attributes:
        rounding: The name of a member of `Rounding`.
        saturation: The name of a member of `Saturation`.
        random: The seed or the array of random words of a stochastic mode; None for the others.
        random_bits: Width of the random words, 1 to 32.
    """

    rounding: str = NEAREST
    saturation: str = FINITE
    random: Any = None
    random_bits: int = MAX_RANDOM_BITS

    @property
    def is_default(self) -> bool:
        """Whether it is to the nearest value, ties to even, and the range is not left."""
        return self.rounding == NEAREST and self.saturation == FINITE

    @property
    def is_stochastic(self) -> bool:
        """Whether random words decide."""
        return self.rounding.startswith("Stochastic")


DEFAULT = Policy()


def make_policy(rounding: str, saturation: str, random: Any, random_bits: int) -> Policy:
    """Put a policy together, of known names and with random words exactly where they are used.

    Args:
        rounding: The name of a member of `Rounding`.
        saturation: The name of a member of `Saturation`.
        random: The seed or the random words of stochastic rounding; None for the other modes.
        random_bits: Width of the random words, 1 to 32.

    Returns:
        The policy.

    Raises:
        ValueError: If a name is unknown, random words are missing or not used, or the width is
            out of range.
    """
    if random is None and (rounding, saturation, random_bits) == (NEAREST, FINITE, MAX_RANDOM_BITS):
        return DEFAULT
    policy = Policy(rounding, saturation, random, random_bits)
    _check_member("rounding", rounding, Rounding)
    _check_member("saturation", saturation, Saturation)
    if policy.is_stochastic and random is None:
        raise ValueError(f"random is None; {rounding} needs a seed or an array of random words")
    if not policy.is_stochastic and random is not None:
        raise ValueError(f"random must be None: {rounding} uses no random words")
    if type(random_bits) is not int or not 1 <= random_bits <= MAX_RANDOM_BITS:
        raise ValueError(
            f"random_bits is {random_bits!r}; it must be an integer from 1 to {MAX_RANDOM_BITS}"
        )
    return policy


def _check_member(argument: str, name: str, modes: type[StrEnum]) -> None:
    allowed = [mode.value for mode in modes]
    if name not in allowed:
        raise ValueError(f"{argument} is {name!r}; allowed: {', '.join(allowed)}")
