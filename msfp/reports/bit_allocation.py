"""How a budget was divided, in tables of at most 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msfp.ptq.bit_allocation import Allocation

STEP, BEYOND = 0.5, 3.0
"""Bits for each weight between two rows of the table, and from the budget to the last but one."""


def describe(found: Allocation) -> str:
    """Return what each bit buys, and the weights by bits and rank.

    Example:
        >>> curve = [(3.1, 12.0), (3.9, 20.0), (5.2, 23.0)]
        >>> print(describe(Allocation({}, 4.4, 22.0, curve, {(4, 0): 10**6, (6, 8): 500_000})))
        bits for each weight   predicted SQNR, dB
                        3.10                 12.0
                        3.90                 20.0
                        4.40                 22.0   <- budget
                        5.20                 23.0
        <BLANKLINE>
        million weights, by their bits and the rank of the branch beside them
        bits   rank 0  rank 8
           4     1.00
           6             0.50
        <BLANKLINE>
    """
    lines = [f"{'bits for each weight':>20}{'predicted SQNR, dB':>21}"]
    chosen = found.bits_per_weight, found.predicted_sqnr
    for point in sorted({chosen, *_spread(found.curve, chosen[0])}):
        mark = "   <- budget" if point == chosen else ""
        lines.append(f"{point[0]:20.2f}{point[1]:21.1f}{mark}")
    unit, scale, digits = _unit(sum(found.weights.values()))
    lines += ["", f"{unit}weights, by their bits and the rank of the branch beside them"]
    widths, ranks = (sorted(set(each)) for each in zip(*found.weights, strict=True))
    lines.append("bits " + "".join(f"{f'rank {rank}':>8}" for rank in ranks))
    for bits in widths:
        cells = [found.weights.get((bits, rank)) for rank in ranks]
        texts = ["" if each is None else f"{each / scale:.{digits}f}" for each in cells]
        lines.append(f"{bits:4} {''.join(f'{text:>8}' for text in texts)}".rstrip())
    return "\n".join(lines) + "\n"


def _unit(weights: int) -> tuple[str, float, int]:
    """Return the unit in which a number of weights is written, its size, and the digits."""
    return ("million ", 1e6, 2) if weights > 1e6 else ("", 1, 0)


def _spread(curve: Sequence[tuple[float, float]], budget: float) -> list[tuple[float, float]]:
    """Return the ends of a curve, and its first point in each step up to some bits more."""
    firsts: dict[int, tuple[float, float]] = {}
    for point in curve:
        if point[0] <= budget + BEYOND and abs(point[0] - budget) >= STEP / 2:
            firsts.setdefault(math.floor(point[0] / STEP), point)
    return [curve[0], *firsts.values(), curve[-1]]
