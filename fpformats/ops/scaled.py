"""Rounding to a format that is scaled and shifted: s * round((x - z) / s) + z.

The result is defined by these floating-point operations in this order. Each is rounded separately,
with true division and no fused multiply-add, in float32 (float64 for float64 values). Without a
zero point z there is no subtraction and no addition.

The shape of the scale sets the granularity. A number is one scale for the tensor. Shape
(C, 1, 1, 1) is one scale for each of C channels, by broadcasting. ``block_size`` has one number for
each dimension: every block of that size has a scale, and the scale has ceil(length / block) entries
along each dimension. (1, 64) makes groups of 64 along rows, (128, 128) makes square blocks, and -1
stands for the whole length. Blocks at the ends may be shorter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fpformats.engine import dispatch
from fpformats.engine.arrays import (
    check_out,
    check_target,
    check_words,
    compute_dtype,
    drawn,
    float_dtype_of,
    grid_of,
    needs_gradient,
    result_dtype,
)
from fpformats.engine.bit_packing import checked_packed
from fpformats.engine.scales import make_scales
from fpformats.ops import elementwise
from fpformats.parsing import as_format
from fpformats.rounding import FINITE, NEAREST, make_policy

if TYPE_CHECKING:
    from fpformats.parsing import FormatLike


def quantize_scaled(
    x: Any,
    fmt: FormatLike,
    scale: Any,
    zero_point: Any = None,
    *,
    block_size: tuple[int, ...] | None = None,
    rounding: str = NEAREST,
    saturation: str = FINITE,
    random: Any = None,
    random_bits: int = 32,
    clip_gradient: bool = False,
    out: Any = None,
) -> Any:
    """Round to the values of a format times `scale` plus `zero_point`.

    Let v = (x - z) / s and let q be its rounded value. The gradients of s * q + z are those of
    learned step sizes (LSQ, arXiv 1902.08153). Where v is in the format's range, they are 1 for x,
    q - v for the scale and 0 for the zero point. Beyond the range, they are 1 (0 with
    `clip_gradient`), q and 1. The backward pass may round again, so `x` must not change before it.

    Args:
        x: Array, tensor or number of float16, bfloat16, float32 or float64. The two narrow dtypes
            are computed in float32, and the result is rounded to the dtype of `x`.
        fmt: The format, or its name.
        scale: Positive and finite; number, or array of the library of `x` that broadcasts to
            its shape. Numbers are rounded to float32 (float64 where `x` is).
        zero_point: Finite; of the same kinds as `scale`, or None for no shift.
        block_size: Sizes of the blocks that share a scale and a zero point, by dimension.
        rounding: Rounding mode of the scaled values, as in `fpformats.quantize`.
        saturation: As in `fpformats.quantize`.
        random: As in `fpformats.quantize`.
        random_bits: As in `fpformats.quantize`.
        clip_gradient: Whether the gradient of `x` is zero beyond the format's range.
        out: Array or tensor of the kind, shape and dtype of `x` to write to; may be `x`.

    Returns:
        Values of the kind, shape, dtype and device of `x`, or `out`.

    Raises:
        TypeError: If an argument is not floating point, or its dtype is wider than the compute
            dtype.
        ValueError: If `scale` is not positive and finite or `zero_point` not finite (not checked
            under torch.compile), a shape does not broadcast, the format does not fit into the
            compute dtype, or `out` has another shape or device, or would cut off a gradient.

    Example:
        >>> from fpformats import E2M1
        >>> quantize_scaled(1.0, E2M1, 0.75)
        1.125
    """
    policy, fmt = make_policy(rounding, saturation, drawn(random), random_bits), as_format(fmt)
    dtype = compute_dtype(float_dtype_of(x))
    grid = grid_of(fmt, dtype)
    scales = make_scales(x, scale, zero_point, block_size, dtype)
    check_out(out, x)
    check_words(policy.random, random_bits, x)
    if not needs_gradient(x, scale, zero_point, out=out):
        return dispatch.quantize(x, fmt, grid, policy, scales, out)
    from fpformats.ops.gradients import Step, learned_step

    step = Step(fmt, grid, dtype, policy, scales, clip_gradient)
    return learned_step(x, scale, zero_point, step)


def encode_scaled(
    x: Any,
    fmt: FormatLike,
    scale: Any,
    zero_point: Any = None,
    *,
    block_size: tuple[int, ...] | None = None,
    rounding: str = NEAREST,
    saturation: str = FINITE,
    random: Any = None,
    random_bits: int = 32,
    nan: int | None = None,
    packed: bool = False,
    out: Any = None,
) -> Any:
    """Round to the codes of a format, after a shift and a division by the scale.

    `decode_scaled` turns the codes into the result of `quantize_scaled`, bit for bit.

    Args:
        x: As in `quantize_scaled`.
        fmt: The format, or its name.
        scale: As in `quantize_scaled`.
        zero_point: As in `quantize_scaled`.
        block_size: As in `quantize_scaled`.
        rounding: As in `quantize_scaled`.
        saturation: As in `quantize_scaled`.
        random: As in `quantize_scaled`.
        random_bits: As in `quantize_scaled`.
        nan: Code to give for NaN, as in `fpformats.encode`.
        packed: Whether to store the codes side by side, as in `fpformats.encode`.
        out: Where to write to, as in `fpformats.encode`.

    Returns:
        Codes in the smallest unsigned integer dtype that has `fmt.bits` bits, or packed.

    Raises:
        TypeError: As in `quantize_scaled`.
        ValueError: As in `quantize_scaled` and `fpformats.encode`.

    Example:
        >>> from fpformats import E2M1
        >>> encode_scaled(1.0, E2M1, 0.75)
        3
    """
    policy, fmt = make_policy(rounding, saturation, drawn(random), random_bits), as_format(fmt)
    dtype = compute_dtype(float_dtype_of(x))
    grid = grid_of(fmt, dtype)
    nan_code = elementwise.checked_nan_code(nan, fmt)
    scales = make_scales(x, scale, zero_point, block_size, dtype)
    check_words(policy.random, random_bits, x)
    elementwise.check_packable(x, fmt, packed)
    elementwise.check_codes_target(out, x, fmt, packed)
    return dispatch.encode(x, fmt, grid, policy, nan_code, packed, scales, out)


def decode_scaled(
    codes: Any,
    fmt: FormatLike,
    scale: Any,
    zero_point: Any = None,
    *,
    dtype: Any = "float32",
    block_size: tuple[int, ...] | None = None,
    shape: tuple[int, ...] | int | None = None,
    out: Any = None,
) -> Any:
    """Give the values of codes, times the scale, plus the zero point.

    Scales and zero points that require a gradient get one.

    Args:
        codes: Array or tensor of any integer dtype and any shape, or an int.
        fmt: The format, or its name.
        scale: As in `quantize_scaled`, broadcasting to the shape of `codes`.
        zero_point: As in `quantize_scaled`, broadcasting to the shape of `codes`.
        dtype: Dtype of the result; float16 and bfloat16 are computed in float32 and rounded.
        block_size: As in `quantize_scaled`.
        shape: For packed codes, their shape before packing.
        out: Where to write to, as in `fpformats.decode`.

    Returns:
        Values of the dtype, of the kind, shape and device of `codes`; a float for an int.

    Raises:
        TypeError: As in `quantize_scaled` and `fpformats.decode`.
        ValueError: As in `quantize_scaled` and `fpformats.decode`.

    Example:
        >>> from fpformats import E2M1
        >>> decode_scaled(3, E2M1, 0.75)
        1.125
    """
    result, fmt = result_dtype(dtype, codes), as_format(fmt)
    working = compute_dtype(result)
    grid = grid_of(fmt, working)
    wanted = None if shape is None else checked_packed(codes, fmt.bits, shape)
    scales = make_scales(codes, scale, zero_point, block_size, working, wanted)
    check_target(out, codes, result.name, wanted)
    if needs_gradient(scale, zero_point, out=out):
        from fpformats.ops.gradients import rescaled_step

        values = dispatch.decode(codes, fmt, grid, working, wanted)
        return rescaled_step(values, scale, zero_point, scales, result)
    return dispatch.decode(codes, fmt, grid, result, wanted, scales, out)
