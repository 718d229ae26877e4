"""Rounding, encoding and decoding in whole-array operations, for NumPy and for torch.

The functions take the library as `xp`: the modules numpy and torch spell these operations alike.

The hardware does the rounding. A number whose last bit is the format's spacing at x is added to x
and subtracted again. The sum is thereby rounded to that spacing, once, to nearest with ties to
even. The spacing comes from the exponent bits of x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from fpformats.kernels.grid import Grid


def quantize(xp: ModuleType, x: Any, grid: Grid) -> Any:
    """Round to the nearest value of a format.

    Args:
        xp: The library of `x`, numpy or torch.
        x: Array of the grid's dtype. NaN stays NaN.
        grid: The format.

    Returns:
        A new array of the shape and dtype of `x`.
    """
    if grid.lifted is not None:
        x = xp.clip(x, grid.low, grid.high)
        lifted = _round(xp, xp.clip(x, -1.0, 1.0) * grid.lift, grid.lifted) / grid.lift
        return xp.where(abs(x) < grid.floor, lifted, _round(xp, x, grid))
    return _round(xp, x, grid)


def encode(xp: ModuleType, values: Any, grid: Grid, nan_code: int | None) -> Any:
    """Give the codes of values that are on the grid.

    Args:
        xp: The library of `values`, numpy or torch.
        values: Array of the grid's dtype, of values of the format or NaN.
        grid: The format.
        nan_code: Code to give for NaN; None if there is no NaN in `values`.

    Returns:
        Array of signed integers as wide as the dtype, with the codes in the low bits.
    """
    magnitudes = abs(values)
    special = None
    if nan_code is not None or grid.infinity_code >= 0:
        special = xp.isnan(values) if grid.infinity_code < 0 else ~(magnitudes <= grid.high)
        magnitudes = xp.where(special, grid.high, magnitudes)
    codes = _index(xp, magnitudes, grid)
    if grid.lifted is not None:
        lifted = _index(xp, xp.clip(magnitudes, 0.0, 1.0) * grid.lift, grid.lifted)
        codes = xp.where(magnitudes < grid.floor, lifted, codes)
    if grid.infinity_code >= 0:
        codes = xp.where(special, grid.infinity_code, codes)
    top = grid.exponent_mask.bit_length()
    if grid.signed:
        codes |= ((_bits(xp, values, grid) >> top) & 1) << grid.magnitude_bits
    if nan_code is None:
        return codes
    # If the format fills the dtype, the code becomes a signed number of the same bits.
    nan = special if grid.infinity_code < 0 else xp.isnan(values)
    return xp.where(nan, nan_code - (nan_code >> top << (top + 1)), codes)


def decode(xp: ModuleType, codes: Any, grid: Grid) -> Any:
    """Give the values of codes.

    Args:
        xp: The library of `codes`, numpy or torch.
        codes: Array of signed integers as wide as the grid's dtype.
        grid: The format.

    Returns:
        Array of the grid's dtype.
    """
    magnitudes = codes & ((1 << grid.magnitude_bits) - 1)
    values = _from_index(xp, magnitudes, grid)
    if grid.lifted is not None:
        lifted = _from_index(xp, magnitudes, grid.lifted) / grid.lift
        values = xp.where(magnitudes < grid.lifted_codes, lifted, values)
    if grid.infinity_code >= 0:
        values = xp.where(magnitudes == grid.infinity_code, float("inf"), values)
    if grid.first_nan >= 0:
        values = xp.where(magnitudes >= grid.first_nan, float("nan"), values)
    if not grid.signed:
        return values
    negative = ((codes >> grid.magnitude_bits) & 1) == 1
    if grid.nan_is_negative_zero:
        values = xp.where(negative & (magnitudes == 0), float("nan"), values)
    return xp.where(negative, -values, values)


def _round(xp: ModuleType, x: Any, grid: Grid) -> Any:
    y = xp.clip(x, grid.low, grid.high)
    if grid.smallest:
        y = _round_below_smallest(xp, y, grid)
    binade = _floats(xp, _bits(xp, y, grid) & grid.exponent_mask, grid)
    _in_place(xp, "clip", binade, grid.floor, grid.ceiling)
    if grid.ties_by_parity:
        y = _break_ties(xp, y, binade, grid)
    if grid.magic:
        _snap(y, binade, grid.magic)
    else:
        binade *= grid.spacing
        y /= binade
        _in_place(xp, "round", y)
        y *= binade
    if not grid.signed:
        return _in_place(xp, "abs", y)
    _in_place(xp, "copysign", y, x)
    if not grid.negative_zero:
        y += 0.0
    return y


def _in_place(xp: ModuleType, name: str, y: Any, *arguments: Any) -> Any:
    """Apply a function in place; torch.compile takes no `out=` that is not contiguous."""
    if xp.__name__ == "torch":
        return getattr(y, f"{name}_")(*arguments)
    return getattr(xp, name)(y, *arguments, out=y)


def _round_below_smallest(xp: ModuleType, y: Any, grid: Grid) -> Any:
    """Choose between zero and the smallest value, which is more than one step from zero."""
    magnitude = abs(y)
    raised = xp.clip(magnitude, grid.smallest, grid.high)
    return raised * (magnitude + magnitude > grid.smallest) if grid.zero else raised


def _break_ties(xp: ModuleType, y: Any, binade: Any, grid: Grid) -> Any:
    """Move ties off the midpoint where rounding the mantissa to even would give an odd code.

    Without mantissa bits, the hardware sees a tie between 1 and 2 steps and rounds up, to 2. In
    binades with an even code it must round down, as the next smaller number does. The pattern of
    NaN must not change; NaN has been given the binade `ceiling`, whose code is odd.
    """
    even = ((_bits(xp, binade, grid) >> grid.width) - grid.first_field) & 1
    return _floats(xp, _bits(xp, y, grid) - even, grid)


def _index(xp: ModuleType, magnitudes: Any, grid: Grid) -> Any:
    """Give the codes of values >= 0: the larger of the linear code and that of the bit pattern."""
    codes = xp.asarray(
        xp.clip(magnitudes, 0.0, grid.linear_high) / grid.quantum, dtype=getattr(xp, grid.integer)
    )
    if grid.shift < 0:
        return codes
    return xp.maximum(codes, (_bits(xp, magnitudes, grid) >> grid.shift) - grid.offset)


def _from_index(xp: ModuleType, magnitudes: Any, grid: Grid) -> Any:
    linear = xp.asarray(magnitudes, dtype=getattr(xp, grid.floating)) * grid.quantum
    if grid.shift < 0:
        return linear
    pattern = (magnitudes + grid.offset) << grid.shift
    return xp.where(magnitudes < grid.linear, linear, _floats(xp, pattern, grid))


def _snap(y: Any, binade: Any, magic: float) -> None:
    """Round y in place to the last bit of the product `magic` times `binade`, which is exact."""
    if hasattr(y, "add_"):  # torch multiplies and adds in one pass
        y.add_(binade, alpha=magic).sub_(binade, alpha=magic)
    else:
        binade *= magic
        y += binade
        y -= binade


def _bits(xp: ModuleType, values: Any, grid: Grid) -> Any:
    return values.view(getattr(xp, grid.integer))


def _floats(xp: ModuleType, bits: Any, grid: Grid) -> Any:
    return bits.view(getattr(xp, grid.floating))
