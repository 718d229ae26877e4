"""Scales of blocks with the least squared error, among the codes of the scale format.

The rule of a block format derives a scale from the largest magnitude of the block. Other scales can
have a smaller error: a smaller one saturates the largest element and rounds the others finer, a
larger one puts the largest element on a lower value of the format ("four over six" is the case of 4
in place of 6 for E2M1). All codes near that of the rule are tried, and the best is kept.
"""

from __future__ import annotations

from typing import Any

from fpformats.engine.arrays import cast, library_of
from fpformats.ops.block_formats import BlockFormat, Blocks, as_block_format
from fpformats.ops.block_scaling import better, checked_tensor_scale, rule_codes, try_scales
from fpformats.ops.blocks import checked_axis, encode_blocks

MOST_IN_OCTAVE = 8
"""Most scales that are tried within an octave."""


def search_blocks(
    x: Any,
    fmt: BlockFormat | str,
    *,
    axis: int = -1,
    tensor_scale: Any = None,
) -> Blocks:
    """Round to the codes of blocks, with the scales that have the least squared error.

    The scales tried are those of the codes from half an octave below that of the rule to an octave
    above it. Zero is not tried, unless the rule gives it for a block of zeros. Of equally good
    scales, the one nearest to that of the rule is kept, the smaller one of two. A block with NaN
    or infinity has the scale of the rule.

    Args:
        x: As in `encode_blocks`.
        fmt: The block format, or the name of a preset.
        axis: The axis that blocks lie along.
        tensor_scale: As in `encode_blocks`.

    Returns:
        Codes and scales, as `encode_blocks` gives.

    Raises:
        TypeError: As in `encode_blocks`.
        ValueError: As in `encode_blocks`.

    Example:
        >>> import numpy as np
        >>> from fpformats import decode_blocks, quantize_blocks
        >>> x = np.array([4.0, 3.0, 2.0, 1.0] * 4 + [9.0] * 16)
        >>> quantize_blocks(x, "NVFP4")[:4].round(2).tolist()
        [3.86, 2.57, 1.93, 0.96]
        >>> decode_blocks(search_blocks(x, "NVFP4"), "NVFP4", dtype="float64")[:4].round(2).tolist()
        [3.86, 2.89, 1.93, 0.96]
    """
    scales, whole = search_scales(x, fmt, axis=axis, tensor_scale=tensor_scale)
    return encode_blocks(x, fmt, axis=axis, scales=scales, tensor_scale=whole)


def search_scales(
    x: Any, fmt: BlockFormat | str, *, axis: int = -1, tensor_scale: Any = None
) -> tuple[Any, Any]:
    """Give the codes of the scales that `search_blocks` finds, and the tensor's scale or None."""
    fmt = as_block_format(fmt)
    axis = checked_axis(x, tuple(getattr(x, "shape", ())), axis)
    whole = checked_tensor_scale(x, fmt, axis, tensor_scale)
    rules, whole = rule_codes(x, fmt, axis, whole)
    pairs = zip(fmt.choices, rules, strict=True)
    found = [_searched(x, choice, axis, rule, whole) for choice, rule in pairs]
    codes, errors = zip(*found, strict=True)
    return better(fmt, list(codes), list(errors))[0], whole


def _searched(x: Any, fmt: BlockFormat, axis: int, rule: Any, whole: Any) -> tuple[Any, Any]:
    """Give the best codes near those of the rule, of one element format, and their errors."""
    xp = library_of(x)
    start, kind = cast(rule, "int32"), str(rule.dtype).removeprefix("torch.")
    least, best = None, start
    for offset in _offsets(fmt):
        codes = xp.clip(start + offset, fmt.scale.smallest_code, fmt.scale.max_code)
        codes = codes if offset else start  # which may stand for zero or NaN
        errors, _ = try_scales(x, fmt, axis, cast(codes, kind), whole)
        if least is not None:
            codes = xp.where(errors < least, codes, best)
            errors = xp.minimum(errors, least)
        least, best = errors, codes
    return cast(best, kind), least


def _offsets(fmt: BlockFormat) -> list[int]:
    """Give the codes to try, relative to that of the rule: the nearest first."""
    octave = 1 << fmt.scale.mantissa_bits
    step = max(1, octave // MOST_IN_OCTAVE)
    offsets = range(-(-(-octave // 2) // step) * step, octave + 1, step)
    return sorted(offsets, key=lambda offset: (abs(offset), offset))
