"""Encoding, decoding and rounding of blocks.

A block of values v along one axis is stored as the code of a scale s and the codes of v / s. A
stored element stands for element * s. v / s and element * s are float32 operations (float64 for
float64 values), with true division. `fpformats.ops.block_scaling` has the scales, and
`fpformats.ops.block_formats` the formats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fpformats.engine.arrays import (
    assigned,
    cast,
    check_codes,
    check_out,
    check_target,
    compute_dtype,
    float_dtype_of,
    is_tensor,
    library_of,
    needs_gradient,
    quiet,
    refuse_list,
    result_dtype,
    take_blocks,
    widened,
)
from fpformats.engine.bit_packing import pack, unpack
from fpformats.formats import FloatFormat
from fpformats.ops import elementwise
from fpformats.ops.block_formats import BlockFormat, Blocks, as_block_format
from fpformats.ops.block_scaling import block_scales, rounded_blocks, scale_values
from fpformats.ops.elementwise import check_packable
from fpformats.rounding import FINITE, NEAREST

if TYPE_CHECKING:
    from types import ModuleType


def encode_blocks(
    x: Any,
    fmt: BlockFormat | str,
    *,
    axis: int = -1,
    scales: Any = None,
    tensor_scale: Any = None,
    rounding: str = NEAREST,
    saturation: str = FINITE,
    random: Any = None,
    random_bits: int = 32,
    packed: bool = False,
) -> Blocks:
    """Round to the codes of blocks and their scales.

    The last block may be shorter than the others and then has its own scale. NaN in a block makes
    the scale NaN, if the scale format has NaN, and so the whole block, but no other block. That is
    why there is no argument `nan`. Infinity gives the largest possible scale. The results are new
    arrays; there is no `out`, because there are several results.

    Args:
        x: Array or tensor of float16, bfloat16, float32 or float64, of at least one dimension.
        fmt: The block format, or the name of one of `PRESETS`.
        axis: The axis that blocks lie along.
        scales: Codes of the scales, as in `Blocks`. None computes them by the rule of the format.
        tensor_scale: The float32 scale of the whole tensor, as in `Blocks`, such as one from
            calibration. None computes it. Scales that would be too large for their format saturate.
        rounding: Rounding mode of the elements, as in `fpformats.quantize`.
        saturation: Saturation mode of the elements, as in `fpformats.quantize`.
        random: As in `fpformats.quantize`.
        random_bits: As in `fpformats.quantize`.
        packed: Whether to store the codes of the elements side by side, as `fpformats.pack` does
            without an axis.

    Returns:
        Codes and scales, of the library and device of `x`.

    Raises:
        TypeError: If `x` is not a floating-point array, `fmt` not a block format, `scales` are not
            integers, or an argument is of another library than `x`.
        ValueError: If `axis` is out of range, the formats do not fit into the compute dtype, `x`
            contains NaN and the scale format has none, `scales` do not match the blocks or lack
            the tensor scale that the format has, or `tensor_scale` is not positive and finite,
            does not broadcast to the scales, or the format has none.

    Example:
        >>> from fpformats import MXFP4
        >>> blocks = encode_blocks(np.array([[1.0, -3.0, 0.2], [0.0, 8.0, 100.0]]), MXFP4)
        >>> blocks.codes.tolist(), blocks.scales.tolist()
        ([[4, 15, 1], [0, 1, 7]], [[126], [131]])
    """
    fmt = as_block_format(fmt)
    axis = checked_axis(x, tuple(getattr(x, "shape", ())), axis)
    check_packable(x, fmt.element, packed)
    working, xp = compute_dtype(float_dtype_of(x)), library_of(x)
    found = block_scales(x, fmt, axis, scales, tensor_scale)
    with quiet():
        v = widened(x, working) / found.divisors
        # A scale that is NaN makes its block NaN, with any codes.
        v = xp.where(xp.isnan(found.divisors), 0.0, v)

    def encoded(v: Any, element: FloatFormat) -> Any:
        return elementwise.encode(
            v,
            element,
            rounding=rounding,
            saturation=saturation,
            random=random,
            random_bits=random_bits,
        )

    if found.chosen is None:
        codes = encoded(v, fmt.element)
    else:  # what the other format has is not encoded, so that it cannot be refused
        codes = xp.where(
            found.chosen,
            encoded(xp.where(found.chosen, v, 0.0), fmt.choices[1].element),
            encoded(xp.where(found.chosen, 0.0, v), fmt.element),
        )
    if fmt.twos_complement:
        codes = _twos_complement(xp, codes, fmt.element)
    if packed:
        codes = pack(codes, fmt.element.bits)
    return Blocks(codes, found.codes, found.whole)


def decode_blocks(
    blocks: Blocks,
    fmt: BlockFormat | str,
    *,
    axis: int = -1,
    dtype: Any = "float32",
    shape: tuple[int, ...] | int | None = None,
    out: Any = None,
) -> Any:
    """Give the values of encoded blocks.

    Args:
        blocks: The result of `encode_blocks`.
        fmt: The block format, or its name.
        axis: The axis that blocks lie along.
        dtype: Dtype of the result; float16 and bfloat16 are computed in float32 and rounded.
        shape: For packed codes, their shape before packing.
        out: Array or tensor of the shape and dtype of the result to write to.

    Returns:
        Values of the dtype, of the shape, library and device of the codes, or `out`.

    Raises:
        TypeError: If codes or scales are not integers, `fmt` is not a block format, or `out` is of
            another kind or dtype.
        ValueError: If a code or `axis` is out of range, the number of scales does not match the
            blocks, `blocks.tensor_scale` is given but the format has none, or the reverse, the
            number of packed bytes does not match `shape`, or `out` is of another shape.

    Example:
        >>> from fpformats import MXFP4
        >>> blocks = encode_blocks(np.array([1.0, -3.0, 0.2]), MXFP4)
        >>> decode_blocks(blocks, MXFP4)
        array([ 1.  , -3.  ,  0.25], dtype=float32)
    """
    fmt = as_block_format(fmt)
    codes = blocks.codes
    if shape is not None:
        codes = unpack(codes, fmt.element.bits, shape=shape)
    lengths = tuple(getattr(codes, "shape", ()))
    axis = checked_axis(codes, lengths, axis)
    result = result_dtype(dtype, codes)
    working = compute_dtype(result).name
    _check_scales(blocks, fmt, lengths, axis)
    check_target(out, codes, result.name, lengths)
    scales, chosen = scale_values(blocks.scales, fmt, working)
    if blocks.tensor_scale is not None:
        scales = scales * blocks.tensor_scale
    with quiet():
        values = _element_values(codes, fmt, working)
        if chosen is not None:
            chosen = take_blocks(chosen, fmt.size, axis, lengths[axis])
            others = elementwise.decode(codes, fmt.choices[1].element, dtype=working)
            values = library_of(codes).where(chosen, others, values)
        values = values * take_blocks(scales, fmt.size, axis, lengths[axis])
        return assigned(out, cast(values, result.name))


def quantize_blocks(
    x: Any,
    fmt: BlockFormat | str,
    *,
    axis: int = -1,
    scales: Any = None,
    tensor_scale: Any = None,
    rounding: str = NEAREST,
    saturation: str = FINITE,
    random: Any = None,
    random_bits: int = 32,
    out: Any = None,
) -> Any:
    """Round to the result of `encode_blocks` and then `decode_blocks`, in the dtype of `x`.

    The gradient passes straight through to a tensor that requires one.

    Args:
        x: As in `encode_blocks`.
        fmt: The block format, or its name.
        axis: The axis that blocks lie along.
        scales: As in `encode_blocks`.
        tensor_scale: As in `encode_blocks`.
        rounding: Rounding mode of the elements, as in `fpformats.quantize`.
        saturation: Saturation mode of the elements, as in `fpformats.quantize`.
        random: As in `fpformats.quantize`.
        random_bits: As in `fpformats.quantize`.
        out: Array or tensor of the kind, shape and dtype of `x` to write to; may be `x`.

    Returns:
        Values of the shape, dtype, library and device of `x`, or `out`.

    Raises:
        TypeError: As in `encode_blocks`, or if `out` is of another kind or dtype.
        ValueError: As in `encode_blocks`, or if `out` has another shape or device, or would cut
            off a gradient.

    Example:
        >>> quantize_blocks(np.array([1.0, -3.0, 0.2]), "MXFP4")
        array([ 1.  , -3.  ,  0.25])
    """
    fmt = as_block_format(fmt)
    axis = checked_axis(x, tuple(getattr(x, "shape", ())), axis)
    dtype = float_dtype_of(x)
    check_out(out, x)
    learning = needs_gradient(x, out=out)
    found = block_scales(x, fmt, axis, scales, tensor_scale)

    def rounded(element: FloatFormat) -> Any:
        return rounded_blocks(
            x,
            element,
            found.divisors,
            rounding=rounding,
            saturation=saturation,
            random=random,
            random_bits=random_bits,
        )

    if found.nearest is not None and (rounding, saturation, random) == (NEAREST, FINITE, None):
        y = found.nearest
    elif found.chosen is not None:
        others = rounded(fmt.choices[1].element)
        y = library_of(x).where(found.chosen, others, rounded(fmt.element))
    else:
        y = rounded(fmt.element)
    with quiet():
        y = cast(y, dtype.name)
    if learning:
        from fpformats.ops.gradients import straight_through

        return straight_through(y, x, None)
    return assigned(out, y)


def _twos_complement(xp: ModuleType, codes: Any, element: FloatFormat) -> Any:
    """Turn sign and magnitude into two's complement."""
    wide = cast(codes, "int32")
    magnitudes = wide & (element.code_count // 2 - 1)
    negative = wide >> element.magnitude_bits == 1
    wrapped = xp.where(negative, element.code_count - magnitudes, magnitudes)
    name = str(codes.dtype).removeprefix("torch.")
    return cast(wrapped & (element.code_count - 1), name)


def _element_values(codes: Any, fmt: BlockFormat, working: str) -> Any:
    if not fmt.twos_complement:
        return elementwise.decode(codes, fmt.element, dtype=working)
    check_codes(codes, fmt.element.bits, str(fmt.element))
    wide = cast(codes, "int32")
    signed = wide - (wide >> fmt.element.magnitude_bits) * fmt.element.code_count
    return cast(signed, working) * fmt.element.smallest


def _check_scales(blocks: Blocks, fmt: BlockFormat, shape: tuple[int, ...], axis: int) -> None:
    if (blocks.tensor_scale is not None) != fmt.tensor_scale:
        has, needs = ("one", "none") if blocks.tensor_scale is not None else ("none", "one")
        raise ValueError(f"blocks.tensor_scale: there is {has}, and the format has {needs}")
    expected = list(shape)
    expected[axis] = -(-expected[axis] // fmt.size)
    if list(blocks.scales.shape) != expected:
        given = tuple(blocks.scales.shape)
        raise ValueError(f"blocks.scales has shape {given}; the codes need {tuple(expected)}")


def checked_axis(x: Any, shape: tuple[int, ...], axis: int) -> int:
    """Give an axis of an array of a shape as a number from 0 on; raise an error if it has none."""
    refuse_list(x, "x")
    if not (is_tensor(x) or isinstance(x, np.ndarray)):
        raise TypeError(f"x is a {type(x).__name__}; it must be a NumPy array or a torch tensor")
    if type(axis) is not int or not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis is {axis!r}; x has {len(shape)} dimensions")
    return axis % len(shape)
