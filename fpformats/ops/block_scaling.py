"""The scales of blocks: by the rule of the format, or given; and the format of each block.

The scale of a block is its largest magnitude m, divided by a power of two or by the largest
element, and rounded to the scale format. Scale rules differ only in the divisor and in the
rounding. The quotient that is rounded is one float64 operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fpformats.engine.arrays import (
    cast,
    check_codes,
    compute_dtype,
    float_dtype_named,
    float_dtype_of,
    is_hidden,
    is_tensor,
    library_of,
    padded,
    quiet,
    take_blocks,
    widened,
)
from fpformats.ops import elementwise
from fpformats.ops.block_formats import BlockFormat, ScaleRule

if TYPE_CHECKING:
    from types import ModuleType

WIDE = float_dtype_named("float64")
_ROUNDINGS = {
    ScaleRule.Floor: "TowardZero",
    ScaleRule.Ceil: "TowardPositive",
    ScaleRule.Nearest: "NearestTiesToEven",
    ScaleRule.RCeil: "TowardPositive",
    ScaleRule.Max: "NearestTiesToEven",
}


class BlockScales(NamedTuple):
    """The scales of the blocks of an array.

    Attributes:
        codes: Codes of the scales, one for each block, with the choice of the elements' format.
        whole: The scale of the whole tensor, or None.
        divisors: What each number is divided by, of the shape of the array; infinity for a scale
            of zero.
        chosen: Where the elements have the alternative format, likewise. None if there is none.
        nearest: The numbers rounded to nearest, in the compute dtype, if the choice of the format
            needed them; or None.
    """

    codes: Any
    whole: Any
    divisors: Any
    chosen: Any
    nearest: Any = None


def block_scales(
    x: Any, fmt: BlockFormat, axis: int, codes: Any = None, tensor_scale: Any = None
) -> BlockScales:
    """Give the scales of the blocks of an array.

    Args:
        x: The array or tensor.
        fmt: The block format.
        axis: The axis of the blocks, at least 0.
        codes: Codes of the scales; None computes them by the rule.
        tensor_scale: The scale of the whole tensor; None computes it, if the format has one.

    Raises:
        TypeError: If `codes` or `tensor_scale` are not of the library of `x`.
        ValueError: If they do not suit `x` and the format.
    """
    whole = checked_tensor_scale(x, fmt, axis, tensor_scale)
    if codes is not None:
        _check_given(codes, x, fmt, scales_shape(x, fmt, axis), whole)
        return _spread(x, fmt, axis, codes, whole)
    rules, whole = rule_codes(x, fmt, axis, whole)
    if fmt.alternative is None:
        return _spread(x, fmt, axis, rules[0], whole)
    pairs = zip(fmt.choices, rules, strict=True)
    tried = [try_scales(x, choice, axis, rule, whole) for choice, rule in pairs]
    found = _spread(x, fmt, axis, better(fmt, rules, [errors for errors, _ in tried])[0], whole)
    nearest = library_of(x).where(found.chosen, tried[1][1], tried[0][1])
    return found._replace(nearest=nearest)


def rule_codes(x: Any, fmt: BlockFormat, axis: int, whole: Any) -> tuple[list[Any], Any]:
    """Give the codes of the scales by the rule for each choice of a format, and the tensor's scale.

    Args:
        x: As for `block_scales`, like `axis`.
        fmt: The block format.
        axis: The axis.
        whole: The scale of the whole tensor, or None to compute it, if the format has one.
    """
    maxima = [_block_maxima(x, choice, axis) for choice in fmt.choices]
    if fmt.tensor_scale and whole is None:
        whole = _tensor_scale(maxima[0], fmt)
    pairs = zip(maxima, fmt.choices, strict=True)
    return [_by_rule(largest, choice, whole) for largest, choice in pairs], whole


def better(fmt: BlockFormat, codes: list[Any], errors: list[Any]) -> tuple[Any, Any]:
    """Give the codes of the choices with less error, marked with the choice, and the errors.

    Args:
        fmt: The block format.
        codes: Codes of scales for each of its choices.
        errors: The errors of the blocks for each.
    """
    if len(codes) == 1:
        return codes[0], errors[0]
    xp = library_of(codes[0])
    chosen = errors[1] < errors[0]
    marked = codes[1] | 1 << fmt.scale.magnitude_bits
    return xp.where(chosen, marked, codes[0]), xp.where(chosen, errors[1], errors[0])


def try_scales(x: Any, fmt: BlockFormat, axis: int, codes: Any, whole: Any) -> tuple[Any, Any]:
    """Give the squared errors of blocks, in float64, and their numbers rounded to nearest.

    Args:
        x: The array or tensor.
        fmt: A format without an alternative.
        axis: The axis of the blocks, at least 0.
        codes: Codes of the scales.
        whole: The scale of the whole tensor, or None.
    """
    xp = library_of(x)
    divisors = _spread(x, fmt, axis, codes, whole).divisors
    rounded = rounded_blocks(x, fmt.element, divisors)
    with quiet():
        errors = xp.square(widened(rounded, WIDE) - widened(x, WIDE))
        return _block_sums(xp, errors, fmt.size, axis), rounded


def rounded_blocks(x: Any, element: Any, divisors: Any, **policies: Any) -> Any:
    """Give numbers divided, rounded to an element format and multiplied, in the compute dtype."""
    with quiet():
        v = widened(x, compute_dtype(float_dtype_of(x))) / divisors
        q = elementwise.quantize(v, element, **policies)
        # For a scale of zero, the divisor is infinity and q is zero; their product would be NaN.
        return q * library_of(x).where(divisors == float("inf"), 0.0, divisors)


def scale_values(codes: Any, fmt: BlockFormat, dtype: str) -> tuple[Any, Any]:
    """Give the values of codes of scales, and where they choose the alternative format, or None."""
    if fmt.alternative is None:
        return elementwise.decode(codes, fmt.scale, dtype=dtype), None
    check_codes(codes, fmt.scale.bits, str(fmt.scale))
    magnitudes = codes & (1 << fmt.scale.magnitude_bits) - 1
    return elementwise.decode(magnitudes, fmt.scale, dtype=dtype), codes != magnitudes


def checked_tensor_scale(x: Any, fmt: BlockFormat, axis: int, tensor_scale: Any) -> Any:
    """Give a tensor scale as float32 of the library of `x`; None if none is given.

    Raises:
        TypeError: If it is of another library.
        ValueError: If the format has none, or it is not positive and finite, or does not broadcast
            to the scales.
    """
    if tensor_scale is None:
        return None
    if not fmt.tensor_scale:
        raise ValueError(f"tensor_scale is {tensor_scale!r}; the format has none: it must be None")
    if is_tensor(tensor_scale) and not is_tensor(x):
        raise TypeError(f"tensor_scale is a {type(tensor_scale).__name__}; x is a NumPy array")
    xp, shape = library_of(x), scales_shape(x, fmt, axis)
    on = {"device": x.device} if is_tensor(x) else {}
    scale = xp.asarray(tensor_scale, dtype=xp.float32, **on)
    ends = zip(reversed(scale.shape), reversed(shape), strict=False)
    if len(scale.shape) > len(shape) or any(size not in (1, wanted) for size, wanted in ends):
        raise ValueError(
            f"tensor_scale has shape {tuple(scale.shape)}, which does not broadcast to the shape "
            f"{shape} of the scales"
        )
    if not is_hidden(scale) and not bool(((scale > 0) & (scale < float("inf"))).all()):
        raise ValueError("tensor_scale must be positive and finite")
    return scale


def scales_shape(x: Any, fmt: BlockFormat, axis: int) -> tuple[int, ...]:
    """Give the shape of the scales of an array: along the axis, one for each block."""
    shape = list(x.shape)
    shape[axis] = -(-shape[axis] // fmt.size)
    return tuple(shape)


def _spread(x: Any, fmt: BlockFormat, axis: int, codes: Any, whole: Any) -> BlockScales:
    """Give scales from their codes, with a divisor and a choice for each number."""
    xp, working = library_of(x), compute_dtype(float_dtype_of(x)).name
    scales, chosen = scale_values(codes, fmt, "float64")
    with quiet():
        totals = cast(scales, working)
        if whole is not None:
            totals = totals * cast(whole, working)
    divisors = take_blocks(totals, fmt.size, axis, x.shape[axis])
    if chosen is not None:
        chosen = take_blocks(chosen, fmt.size, axis, x.shape[axis])
    return BlockScales(codes, whole, xp.where(divisors == 0, float("inf"), divisors), chosen)


def _by_rule(largest: Any, fmt: BlockFormat, whole: Any) -> Any:
    """Give the codes of the scales that follow from the largest magnitudes of blocks."""
    by_max = fmt.rule in (ScaleRule.RCeil, ScaleRule.Max)
    with quiet():
        quotients = largest / (fmt.element.max if by_max else 2.0**fmt.element.max_exponent)
        if whole is not None:
            quotients = quotients / whole
    _check_nan(quotients, fmt)
    return elementwise.encode(quotients, fmt.scale, rounding=_ROUNDINGS[fmt.rule])


def _check_nan(scales: Any, fmt: BlockFormat) -> None:
    """Raise ValueError if scales are NaN but their format has none."""
    if fmt.scale.has_nan or is_hidden(scales):
        return
    if bool(library_of(scales).isnan(scales).any()):
        raise ValueError(f"x contains NaN, which the scales' format {fmt.scale} does not have")


def _tensor_scale(largest: Any, fmt: BlockFormat) -> Any:
    """Give the scale that maps the largest magnitude to the largest element and block scale."""
    xp = library_of(largest)
    if 0 in largest.shape:
        return xp.ones_like(largest, dtype=xp.float32).sum() + 1
    # Products with a scale must stay finite, even if the data contain infinity.
    limit = float(np.finfo(np.float32).max) / fmt.scale.max
    largest = xp.where(xp.isnan(largest), 0.0, largest)  # NaN affects only its block
    scale = xp.clip(largest.max() / (fmt.largest_element * fmt.scale.max), None, limit)
    rounded = xp.asarray(scale, dtype=xp.float32)
    return xp.where(rounded == 0, xp.ones_like(rounded), rounded)


def _check_given(codes: Any, x: Any, fmt: BlockFormat, shape: tuple[int, ...], whole: Any) -> None:
    """Raise an error unless codes of scales are of the library of `x`, and suit its blocks."""
    if is_tensor(codes) != is_tensor(x) or not (is_tensor(codes) or isinstance(codes, np.ndarray)):
        raise TypeError(f"scales is a {type(codes).__name__}; x is a {type(x).__name__}")
    if tuple(codes.shape) != shape:
        raise ValueError(f"scales has shape {tuple(codes.shape)}; x needs {shape}")
    if fmt.tensor_scale and whole is None:
        raise ValueError("tensor_scale is None; scales of this format need the one they belong to")


def _block_maxima(x: Any, fmt: BlockFormat, axis: int) -> Any:
    """Give the largest magnitude of each block in float64; of unsigned elements, value."""
    xp, wide = library_of(x), widened(x, WIDE)
    # Adding zero turns a negative zero into a positive one, in every library.
    magnitudes = abs(wide) if fmt.element.signed else xp.clip(wide, 0.0, None) + 0.0
    rows = padded(xp, xp.swapaxes(magnitudes, axis, -1), fmt.size)
    grouped = rows.reshape(*rows.shape[:-1], rows.shape[-1] // fmt.size, fmt.size)
    largest = grouped.amax(-1) if is_tensor(grouped) else grouped.max(axis=-1)
    return xp.swapaxes(largest, -1, axis)


def _block_sums(xp: ModuleType, errors: Any, size: int, axis: int) -> Any:
    """Give the sum of each block: halves are added, so that all libraries give the same bits."""
    rows = padded(xp, xp.swapaxes(errors, axis, -1), size)
    total = padded(xp, rows.reshape(*rows.shape[:-1], rows.shape[-1] // size, size), _power(size))
    while half := total.shape[-1] // 2:
        total = total[..., :half] + total[..., half:]
    return xp.swapaxes(total[..., 0], -1, axis)


def _power(size: int) -> int:
    """Give the smallest power of two that is not less than a size."""
    return 1 << (size - 1).bit_length()
