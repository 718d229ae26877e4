"""Rounding and saturation modes, under the names that IEEE P3109 gives them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple


class Rounding(StrEnum):
    """How a number between two neighbouring values of the format is rounded (IEEE P3109, 4.6.2).

    "Even" and "odd" refer to the code of the neighbour. In the stochastic modes, v is the distance
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
    """How a rounded value beyond the format's range is replaced (IEEE P3109, 4.6.3).

    In a format without zero, a result of zero is also beyond the range.
    """

    SatFinite = "SatFinite"
    """The nearest finite value of the format, for infinities too."""

    SatPropagate = "SatPropagate"
    """As SatFinite, but infinities stay infinite in a format that has them."""

    SatNone = "SatNone"
    """Infinity in a format that has it, else the nearest finite value. Below the range of an
    unsigned format, NaN. Rounding modes toward the range stay within it, as in IEEE 754."""

    OverflowNaN = "OverflowNaN"
    """As SatNone, but NaN replaces a missing infinity: OCP OFP8's non-saturating mode."""


NEAREST = "NearestTiesToEven"
FINITE = "SatFinite"
MAX_RANDOM_BITS = 32


class Policy(NamedTuple):
    """How to round: the modes, and the random words of a stochastic mode.

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
        """Whether the modes are the default ones: NearestTiesToEven and SatFinite."""
        return self.rounding == NEAREST and self.saturation == FINITE

    @property
    def is_stochastic(self) -> bool:
        """Whether the rounding mode uses random words."""
        return self.rounding.startswith("Stochastic")


DEFAULT = Policy()


def make_policy(rounding: str, saturation: str, random: Any, random_bits: int) -> Policy:
    """Make a policy from checked arguments.

    Args:
        rounding: The name of a member of `Rounding`.
        saturation: The name of a member of `Saturation`.
        random: The seed or the random words of stochastic rounding; None for the other modes.
        random_bits: Width of the random words, 1 to 32.

    Returns:
        The policy.

    Raises:
        ValueError: If a name is unknown, random words are missing in a stochastic mode or given
            in another mode, or the width is out of range.
    """
    if random is None and (rounding, saturation, random_bits) == (NEAREST, FINITE, MAX_RANDOM_BITS):
        return DEFAULT
    policy = Policy(rounding, saturation, random, random_bits)
    _check_member("rounding", rounding, Rounding)
    _check_member("saturation", saturation, Saturation)
    if policy.is_stochastic and random is None:
        raise ValueError(f"random is None; {rounding} needs a seed, a generator or random words")
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
