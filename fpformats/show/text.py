"""Formats as text: a table of all codes, and the values on a number line."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fpformats.formats import readable
from fpformats.ops.elementwise import decode, values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fpformats.formats import FloatFormat

MAX_BITS = 10
LINE_WIDTH = 72


def describe(fmt: FloatFormat) -> str:
    """Describe a format: its facts, its number line, and a row for every code.

    Args:
        fmt: A format of at most 10 bits.

    Returns:
        The description, several lines.

    Raises:
        ValueError: If the format has too many codes to show.

    Example:
        >>> from fpformats import E1M1U
        >>> print(describe(E1M1U))
        FloatFormat(E1M1U: 2 bits, unsigned, bias 0, max 3, finite only)
        smallest 1, exponents 1 to 1, subnormal below 2
        <BLANKLINE>
        |                       |                       |                       |
        0                                                                       3
        <BLANKLINE>
        code  bits  value
           0   0 0  0
           1   0 1  1
           2   1 0  2
           3   1 1  3
    """
    _check_size([fmt])
    facts = f"smallest {fmt.smallest:g}, exponents {fmt.min_exponent} to {fmt.max_exponent}"
    if fmt.smallest_subnormal and fmt.smallest_normal:
        facts += f", subnormal below {fmt.smallest_normal:g}"
    return "\n".join([repr(fmt), facts, "", number_line(fmt), "", *_table(fmt)])


def compare(formats: Sequence[FloatFormat]) -> str:
    """Show formats side by side: their facts in columns, and their values on lines of one scale.

    Args:
        formats: Formats of at most 10 bits.

    Returns:
        The comparison, several lines.

    Raises:
        ValueError: If a format has too many codes to show.

    Example:
        >>> from fpformats import E1M1U, E2M0U
        >>> print(compare([E1M1U, E2M0U]))
                             E1M1U        E2M0U
        bits                 2            2
        bias                 0            1
        largest              3            4
        smallest above zero  1            1
        range in octaves     1.58         2
        specials             finite only  finite only
        <BLANKLINE>
        E1M1U
        |                 |                 |                 |
        E2M0U
        |                 |                 |                                   |
        0                                                                       4
    """
    _check_size(formats)
    rows = [
        ("", [str(fmt) for fmt in formats]),
        ("bits", [str(fmt.bits) for fmt in formats]),
        ("bias", [str(fmt.bias) for fmt in formats]),
        ("largest", [readable(fmt.exact_max) for fmt in formats]),
        ("smallest above zero", [readable(fmt.exact_smallest) for fmt in formats]),
        ("range in octaves", [f"{np.log2(fmt.max / fmt.smallest):.3g}" for fmt in formats]),
        ("specials", [fmt.specials.value for fmt in formats]),
    ]
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(formats))]
    lines = [_columns([name, *cells], [19, *widths]) for name, cells in rows]
    low, high = min(fmt.min for fmt in formats), max(fmt.max for fmt in formats)
    lines.append("")
    for fmt in formats:
        lines += [str(fmt), _marks(values(fmt), low, high)]
    return "\n".join([*lines, _ends(low, high)])


def number_line(fmt: FloatFormat) -> str:
    """Draw the finite values of a format to scale on a line of text, with its ends below.

    Args:
        fmt: The format.

    Returns:
        Two lines of text.
    """
    listed = values(fmt)
    low, high = float(listed[0]), float(listed[-1])
    return _marks(listed, low, high) + "\n" + _ends(low, high)


def _marks(listed: NDArray[np.float64], low: float, high: float) -> str:
    line = [" "] * (LINE_WIDTH + 1)
    reach = 1 - low / high if high > low else 1.0
    for place in np.rint((listed / high - low / high) / reach * LINE_WIDTH):
        line[int(place)] = "|"
    return "".join(line).rstrip()


def _ends(low: float, high: float) -> str:
    ends = f"{low:g}", f"{high:g}"
    return ends[0] + ends[1].rjust(LINE_WIDTH + 1 - len(ends[0]))


def _columns(cells: list[str], widths: list[int]) -> str:
    parts = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join(parts).rstrip()


def _check_size(formats: Sequence[FloatFormat]) -> None:
    for fmt in formats:
        if fmt.bits > MAX_BITS:
            raise ValueError(f"{fmt} has {fmt.bits} bits; at most {MAX_BITS} can be shown")


def _table(fmt: FloatFormat) -> list[str]:
    numbers = decode(np.arange(fmt.code_count), fmt, dtype="float64")
    rows = [(str(code), _fields(code, fmt), f"{x:.12g}") for code, x in enumerate(numbers)]
    rows.insert(0, ("code", "bits", "value"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{code:>{widths[0]}}  {bits:>{widths[1]}}  {value}" for code, bits, value in rows]


def _fields(code: int, fmt: FloatFormat) -> str:
    """Write the sign, exponent and mantissa fields of a code, separated by spaces."""
    digits = f"{code:0{fmt.bits}b}"
    ends = [0, int(fmt.signed), fmt.signed + fmt.exponent_bits, fmt.bits]
    parts = [digits[start:end] for start, end in pairwise(ends)]
    return " ".join(part for part in parts if part)
