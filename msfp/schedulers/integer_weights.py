"""Integer weights of timesteps, so that weighted sums are exact in any order."""

from __future__ import annotations

import math

from msfp.errors import InputError
from msfp.support.checks import check_factors

WEIGHT_STEPS = 1024
"""The largest weight."""


def integer_weights(factors: dict[float, float]) -> dict[float, int]:
    """Return the squares of denoising factors, rounded to 1/1024 of the largest, at least 1.

    Raises:
        InputError: If a factor is not finite, or all are 0.

    Example:
        >>> integer_weights({750: -4.0, 500: 2.0, 250: -0.01})
        {750: 1024, 500: 256, 250: 1}
    """
    check_factors(factors)
    squares = {timestep: factor**2 for timestep, factor in factors.items()}
    largest = max(squares.values(), default=0.0)
    if not (largest > 0 and math.isfinite(sum(squares.values()))):
        raise InputError("factors must be finite, and one of them other than 0")
    return {
        timestep: max(1, round(WEIGHT_STEPS * square / largest))
        for timestep, square in squares.items()
    }


def weight_at(weights: dict[float, int], timestep: float) -> int:
    """Return the weight of the known timestep nearest to a timestep.

    A denoiser in bfloat16 receives timesteps rounded to 1 part in 256, so the two may differ by
    that much.

    Raises:
        InputError: If no known timestep is within 1 part in 256.

    Example:
        >>> weight_at({999: 1024, 501: 7}, 500.0)
        7
    """
    nearest = min(weights, key=lambda known: abs(known - timestep))
    if abs(nearest - timestep) > abs(nearest) / 256:
        raise InputError(
            f"factors has no entry for timestep {timestep:g}; it must have one for each timestep "
            f"of the denoiser's forward, and has {', '.join(f'{t:g}' for t in weights)}"
        )
    return weights[nearest]
