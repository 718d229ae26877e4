"""Rounding in any mode, with any saturation, in whole-array operations, for NumPy and for torch.

A magnitude is split exactly into its lower neighbour and a remainder. From the remainder, the mode
decides without a division whether to take the upper neighbour. Saturation comes last.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from types import ModuleType

    from fpformats.kernels.grid import Grid


class Edges(NamedTuple):
    """Replacements of results that are not values of the format.

    Attributes:
        above: For a finite number that rounds to more than the largest value.
        below: For a finite number that rounds to less than the lowest value.
        infinity: For infinity.
        negative_infinity: For negative infinity.
        zero: For a result of zero in a format without zero; it then takes the sign of the input.
    """

    above: float
    below: float
    infinity: float
    negative_infinity: float
    zero: float


class Step(NamedTuple):
    """The split of magnitudes between neighbours of a grid; all fields are arrays.

    Attributes:
        low: The lower neighbour, at most the largest finite value.
        high_part: The distance between the neighbours minus `low_part`: a power of two.
        low_part: The remainder of that distance; 0 if the distance is a power of two.
        rest: The magnitude minus `low`.
        odd: Whether the code of `low` is odd.
    """

    low: Any
    high_part: Any
    low_part: Any
    rest: Any
    odd: Any


def make_edges(grid: Grid, mode: str, saturation: str) -> Edges:
    """Work out the saturated results beyond the range of a format (IEEE P3109, 4.6.3).

    Args:
        grid: The format.
        mode: Name of a rounding mode.
        saturation: Name of a saturation mode.

    Returns:
        The results, values of the format, infinities or NaN.
    """
    low, high, nan = grid.low, grid.high, math.nan
    infinite = grid.infinity_code >= 0
    infinity = math.inf if infinite else high
    negative_infinity = -math.inf if infinite and grid.signed else low
    smallest = grid.smallest
    if saturation == "SatFinite":
        return Edges(high, low, high, low, smallest)
    if saturation == "SatPropagate":
        return Edges(high, low, infinity, negative_infinity, smallest)
    if saturation == "OverflowNaN" and not infinite:
        infinity = negative_infinity = nan
    if not grid.signed:
        negative_infinity = nan
    above, below = infinity, negative_infinity
    # Between the largest value and infinity, rounding to odd chooses the odd code.
    stays = infinite and mode == "ToOdd" and grid.max_is_odd
    if mode in ("TowardZero", "TowardNegative") or stays:
        above = high
    if mode in ("TowardZero", "TowardPositive") or (stays and grid.signed):
        below = low
    return Edges(above, below, infinity, negative_infinity, nan)


def quantize(
    xp: ModuleType, x: Any, grid: Grid, mode: str, edges: Edges, words: Any, bits: int
) -> Any:
    """Round to the values of a format.

    Args:
        xp: The library of `x`, numpy or torch.
        x: Array of the grid's dtype.
        grid: The format.
        mode: Name of a rounding mode of IEEE P3109.
        edges: The saturated results beyond the range of the format.
        words: int64 array of the random words of the stochastic modes, else None.
        bits: Width of the random words.

    Returns:
        A new array of the shape and dtype of `x`.
    """
    nan = xp.isnan(x)
    number = xp.where(nan | xp.isinf(x), 0.0, x)
    magnitude, negative = abs(number), xp.signbit(number)
    y, over = _round(xp, magnitude, negative, grid, mode, words, bits)
    if grid.lifted is not None:
        lifted = xp.clip(magnitude, None, 1.0) * grid.lift
        small, small_over = _round(xp, lifted, negative, grid.lifted, mode, words, bits)
        # If the format ends below the dtype's normal numbers, those beyond its range are small too.
        is_small = xp.clip(magnitude, None, grid.high) < grid.floor
        y = xp.where(is_small, small / grid.lift, y)
        over = xp.where(is_small, small_over, over)
    y = _signed(xp, y, over, negative, grid, edges)
    y = xp.where(x == math.inf, edges.infinity, y)
    y = xp.where(x == -math.inf, edges.negative_infinity, y)
    return xp.where(nan, x, y)


def _signed(xp: ModuleType, y: Any, over: Any, negative: Any, grid: Grid, edges: Edges) -> Any:
    below = negative & over if grid.signed else negative & (y > 0)
    y = xp.where(over, edges.above, y)
    if not grid.zero:
        y = xp.where(y == 0, edges.zero, y)
    if grid.signed:
        y = xp.where(negative, -y, y)
    y = xp.where(below, edges.below, y)
    return y if grid.negative_zero else y + 0.0


def _round(
    xp: ModuleType, magnitude: Any, negative: Any, grid: Grid, mode: str, words: Any, bits: int
) -> tuple[Any, Any]:
    """Round magnitudes, and tell which of them exceed the largest value."""
    step = _split(xp, magnitude, grid)
    # A step or more beyond the largest value, no mode rounds back to it.
    up = _goes_up(xp, step, negative, mode, words, bits)
    up = up | (step.rest >= step.high_part + step.low_part)
    y = xp.where(up, step.low + (step.high_part + step.low_part), step.low)
    return y, up & (step.low >= grid.high)


def _split(xp: ModuleType, magnitude: Any, grid: Grid) -> Step:
    clipped = xp.clip(magnitude, None, grid.high)
    integer, floating = getattr(xp, grid.integer), getattr(xp, grid.floating)
    exponent = clipped.view(integer) & grid.exponent_mask
    binade = xp.clip(exponent.view(floating), grid.floor, None)
    distance = binade * grid.spacing
    count = xp.floor(clipped / distance)
    low = count * distance
    if grid.ties_by_parity:
        field = binade.view(integer) >> grid.width
        odd = (count > 0) & (((field - grid.first_field) & 1) == 0)
    else:
        odd = xp.floor(count / 2) * 2 != count
    low_part = xp.zeros_like(low)
    if grid.smallest:
        # The gap below the smallest value is as wide as that value: 2**e plus its last bit.
        below = magnitude < grid.smallest
        low = xp.where(below, 0.0, low)
        leading = 2.0 ** (math.frexp(grid.smallest)[1] - 1)
        distance = xp.where(below, leading, distance)
        low_part = xp.where(below, grid.smallest - leading, low_part)
        # If there is no zero, the position below code 0 counts as odd.
        odd = xp.where(below, not grid.zero, odd)
    return Step(low, distance, low_part, magnitude - low, odd)


def _goes_up(xp: ModuleType, step: Step, negative: Any, mode: str, words: Any, bits: int) -> Any:
    rest, distance = step.rest, step.high_part + step.low_part
    if mode == "NearestTiesToEven":
        return (rest + rest > distance) | ((rest + rest == distance) & step.odd)
    if mode == "NearestTiesToAway":
        return rest + rest >= distance
    if mode == "TowardPositive":
        return (rest > 0) & ~negative
    if mode == "TowardNegative":
        return (rest > 0) & negative
    if mode == "ToOdd":
        return (rest > 0) & ~step.odd
    if mode == "TowardZero":
        return xp.zeros_like(negative)
    return _draws_up(xp, step, mode, words, bits)


def _draws_up(xp: ModuleType, step: Step, mode: str, words: Any, bits: int) -> Any:
    """Compare v * 2**(bits + 1) with a threshold from the word, in float64; v = rest / distance.

    Let K = 2**bits - word. For mode A, P3109's floor(v * 2**bits) + word >= 2**bits means
    v * 2**bits >= K. For mode B, the condition is v * 2**bits >= K - 1/2. Mode C first rounds
    v * 2**bits to an integer, ties to even; its condition is that of B, but strict for odd K.
    Dividing by a power of two is exact, and so is the subtraction if its operands are near each
    other.
    """
    ratio = xp.asarray(step.rest / step.high_part, dtype=xp.float64)
    excess = xp.asarray(step.low_part / step.high_part, dtype=xp.float64)
    wanted = xp.asarray((1 << bits) - words, dtype=xp.float64)
    twice = 2 * wanted - (0 if mode == "StochasticA" else 1)
    left, right = ratio * 2.0 ** (bits + 1) - twice, twice * excess
    if mode == "StochasticC":
        return (left > right) | ((left == right) & (words & 1 == 0))
    return left >= right
