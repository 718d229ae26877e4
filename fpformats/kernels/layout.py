"""Which scale an element has."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """Scales of an array in row-major order.

    The array is rows of `row_length` elements. Run j of row i, `run_length` long but for the last
    one, has the scale of index ``i * row_stride + j``: with `row_stride` 0 all rows have the same
    scales.
    """

    row_length: int
    run_length: int
    row_stride: int
