"""Which scale an element has."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """The scales of an array in row-major order.

    The array consists of rows of `row_length` elements. A row consists of runs of `run_length`
    elements, of which the last may be shorter. Run j of row i has the scale at index
    ``i * row_stride + j``. With `row_stride` 0, all rows have the same scales.
    """

    row_length: int
    run_length: int
    row_stride: int
