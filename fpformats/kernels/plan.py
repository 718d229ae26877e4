"""The plan of the fused kernels: a format and a policy as one flat record of plain numbers.

The kernels in C++ and in Triton round one element at a time. They split a magnitude a, exactly in
float64, into a whole number of steps and a rest::

    e = max(exponent of a, exponent of floor)
    step = 2**(e - digits)
    count = floor(a / step)
    code = ((e - exponent of floor) << digits) + count + code_base

`code` is the code of the neighbour nearer zero. The parity, the code of the upper neighbour
(code + 1) and the code of the result all come from this one integer. In formats without subnormal
numbers, the neighbours of a magnitude below `smallest` are zero and `smallest`. Float64 holds all
these numbers for the formats that `make_plan` takes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fpformats.formats import Specials
from fpformats.kernels import portable
from fpformats.kernels.grid import FLOAT_DTYPES, FloatDtype, Grid, holds, make_grid
from fpformats.kernels.policy import Edges, make_edges

if TYPE_CHECKING:
    from fpformats.formats import FloatFormat

MAX_EXPONENT_BITS = 8
MAX_MANTISSA_BITS = 23
LIMIT = 900
"""Largest absolute value of the exponents of steps and values."""


class Plan(NamedTuple):
    """A format and a policy, for kernels that work element by element.

    Attributes:
        low: Lowest finite value.
        high: Largest finite value.
        floor: Power of two below which the spacing stays constant.
        ceiling: Power of two with the largest exponent of any finite value.
        digits: Base-2 logarithm of the number of steps in a binade: step = 2**(e - digits).
        code_base: Code minus count of steps, in the lowest binade: 0, or less without subnormals.
        smallest: Smallest value above zero if it is not one step from zero, else 0.
        zero: Whether there is a zero.
        signed: Whether there are negative values.
        negative_zero: Whether zero has a sign.
        magnitude_bits: Width of a code below the sign.
        max_code: Code of `high`.
        rounding: Name of the rounding mode.
        is_default: Whether the policy is nearest with ties to even and SatFinite.
        is_narrow: Whether the policy is the default and can be computed in float32: all
            intermediate numbers of the rounding sum are normal there, and `smallest` is 0.
        draws_narrow: Whether the policy is StochasticA with SatFinite and can be computed in
            float32.
        edges: Replacements of results that are not values of the format.
        edge_codes: Codes of `edges`, in the same order; -1 for NaN.
        quantum: Smallest spacing.
        linear: Codes below this one are linear: code n stands for n times `quantum`.
        pattern_offset: Bit pattern of a float64, shifted right by 52 - mantissa_bits, minus the
            code, for codes that are not linear.
        mantissa_bits: Width of the mantissa field.
        infinite_code: Magnitude of the code of infinity; -1 without infinity.
        first_nan: Smallest magnitude of a code that is NaN; -1 if there is none.
        nan_is_negative_zero: Whether NaN has the code of negative zero.
    """

    low: float
    high: float
    floor: float
    ceiling: float
    digits: int
    code_base: int
    smallest: float
    zero: bool
    signed: bool
    negative_zero: bool
    magnitude_bits: int
    max_code: int
    rounding: str
    is_default: bool
    is_narrow: bool
    draws_narrow: bool
    edges: Edges
    edge_codes: tuple[int, ...]
    quantum: float
    linear: int
    pattern_offset: int
    mantissa_bits: int
    infinite_code: int
    first_nan: int
    nan_is_negative_zero: bool


def make_plan(fmt: FloatFormat, dtype: FloatDtype, rounding: str, saturation: str) -> Plan | None:
    """Work out the record of a format that the dtype holds.

    Args:
        fmt: The format.
        dtype: Any of the four; its values are widened to float32 or stay in float64.
        rounding: Name of a rounding mode.
        saturation: Name of a saturation mode.

    Returns:
        The record. None if the format has more than 8 exponent or 23 mantissa bits, if its
        exponents leave no room in float64 for the intermediate steps, or if it has 32 bits that
        are all values, because the kernels mark NaN by a code of 32 ones.

    Example:
        >>> from fpformats import E2M1
        >>> plan = make_plan(E2M1, FLOAT_DTYPES["float32"], "NearestTiesToEven", "SatFinite")
        >>> plan.high, plan.floor, plan.digits, plan.max_code
        (6.0, 1.0, 1, 7)
    """
    if fmt.exponent_bits > MAX_EXPONENT_BITS or fmt.mantissa_bits > MAX_MANTISSA_BITS:
        return None
    if fmt.bits == 32 and fmt.specials is not Specials.IEEE:
        return None
    if fmt.scaled_magnitude(fmt.smallest_code)[1] < -LIMIT or fmt.max_exponent > LIMIT:
        return None
    grid = make_grid(fmt, FLOAT_DTYPES["float64"])
    edges = make_edges(grid, rounding, saturation)
    is_default = rounding == "NearestTiesToEven" and saturation == "SatFinite"
    has_room = dtype.name != "float64" and _has_room(fmt)
    draws = rounding == "StochasticA" and saturation == "SatFinite"
    return Plan(
        low=grid.low,
        high=grid.high,
        floor=grid.floor,
        ceiling=math.ldexp(1.0, fmt.max_exponent),
        digits=-(math.frexp(grid.spacing)[1] - 1),
        code_base=0 if fmt.subnormals else -(1 << fmt.mantissa_bits),
        smallest=grid.smallest,
        zero=fmt.zero,
        signed=fmt.signed,
        negative_zero=grid.negative_zero,
        magnitude_bits=fmt.magnitude_bits,
        max_code=fmt.max_code,
        rounding=rounding,
        is_default=is_default,
        is_narrow=is_default and has_room,
        draws_narrow=draws and has_room and grid.quantum >= 2.0**-126,
        edges=edges,
        edge_codes=tuple(_code(grid, value) for value in edges),
        quantum=grid.quantum,
        linear=grid.linear,
        pattern_offset=grid.offset,
        mantissa_bits=fmt.mantissa_bits,
        infinite_code=grid.infinity_code,
        first_nan=grid.first_nan,
        nan_is_negative_zero=grid.nan_is_negative_zero,
    )


def code_dtype(bits: int) -> str:
    """Name the smallest unsigned dtype that holds codes of a width.

    Example:
        >>> code_dtype(4), code_dtype(9)
        ('uint8', 'uint16')
    """
    return f"uint{max(8, 1 << (bits - 1).bit_length())}"


def _has_room(fmt: FloatFormat) -> bool:
    if not holds(FLOAT_DTYPES["float32"], fmt):
        return False
    grid = make_grid(fmt, FLOAT_DTYPES["float32"])
    return grid.lifted is None and grid.magic != 0 and grid.smallest == 0


def _code(grid: Grid, value: float) -> int:
    codes = portable.encode(np, np.array([value]), grid, -1)
    return int(codes[0])
