"""Block formats: the elements of a block have one format and share a scale in another format.

A block of values v along one axis is stored as the code of a scale s and the codes of v / s. A
stored element stands for element * s. The scale is the block's largest magnitude m, divided by a
power of two or by the largest element, and rounded to the scale format. Scale rules differ only
in the divisor and in the rounding. MX (OCP MX 1.0) and NVFP4 (NVIDIA, cuDNN) are presets; any
other composition works the same way.

The quotient that is rounded to the scale is one float64 operation. v / s and element * s are
float32 operations (float64 for float64 values), with true division.

Scales may also be given, such as those that `fpformats.fitting.block_scales` finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fpformats.engine.arrays import (
    assigned,
    cast,
    check_codes,
    check_out,
    check_target,
    compute_dtype,
    float_dtype_named,
    float_dtype_of,
    is_hidden,
    is_tensor,
    library_of,
    needs_gradient,
    padded,
    quiet,
    refuse_list,
    result_dtype,
    take_blocks,
    widened,
)
from fpformats.engine.bit_packing import pack, unpack
from fpformats.formats import FloatFormat
from fpformats.ops import elementwise
from fpformats.ops.elementwise import check_packable
from fpformats.parsing import as_format, parse
from fpformats.rounding import FINITE, NEAREST

if TYPE_CHECKING:
    from types import ModuleType


class ScaleRule(StrEnum):
    """How the scale follows from the largest magnitude m of a block.

    Here, max is the largest element and E is its exponent: 2**E <= max < 2**(E+1).
    """

    Floor = "Floor"
    """m / 2**E rounded down (OCP MX 1.0, 6.3): the largest values may saturate."""

    Ceil = "Ceil"
    """m / 2**E rounded up."""

    Nearest = "Nearest"
    """m / 2**E rounded to nearest, ties to even."""

    RCeil = "RCeil"
    """m / max rounded up: nothing saturates."""

    Max = "Max"
    """m / max rounded to nearest, ties to even (IEEE P3109, NVFP4)."""


_ROUNDINGS = {
    ScaleRule.Floor: "TowardZero",
    ScaleRule.Ceil: "TowardPositive",
    ScaleRule.Nearest: "NearestTiesToEven",
    ScaleRule.RCeil: "TowardPositive",
    ScaleRule.Max: "NearestTiesToEven",
}


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A composition of an element format and a scale format.

    Attributes:
        element: Format of the elements; a name becomes its format.
        scale: Format of the scales, likewise.
        size: Number of elements that share a scale.
        rule: How the scale of a block is computed.
        tensor_scale: Whether scales are relative to one float32 scale of the whole tensor. It
            maps the largest scale to the largest value of the scale format.
        twos_complement: Whether the codes of a uniform element format are two's complement
            integers, as in MXINT8.

    Raises:
        TypeError: If element or scale is not a format.
        ValueError: If no format has the name, the size is not a positive integer, the rule is
            unknown, or `twos_complement` is True for an element that is not signed and uniform.

    Example:
        >>> from fpformats import E2M1U, UE5M3
        >>> ours = BlockFormat(E2M1U, UE5M3, 16, ScaleRule.Max)
        >>> quantize_blocks(np.array([0.1, 0.5, 0.9, -0.2]), ours)
        array([0.078125, 0.46875 , 0.9375  , 0.      ])
    """

    element: FloatFormat
    scale: FloatFormat
    size: int
    rule: ScaleRule = ScaleRule.Floor
    tensor_scale: bool = False
    twos_complement: bool = False

    def __post_init__(self) -> None:
        for name in ("element", "scale"):
            object.__setattr__(self, name, as_format(getattr(self, name), name))
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"size is {self.size!r}; it must be a positive integer")
        if self.rule not in list(ScaleRule):
            raise ValueError(f"rule is {self.rule!r}; allowed: {', '.join(ScaleRule)}")
        uniform = self.element.exponent_bits == 0 and self.element.signed
        if self.twos_complement and not uniform:
            raise ValueError(f"element is {self.element}; two's complement is for signed E0My")


class Blocks(NamedTuple):
    """Encoded blocks.

    Attributes:
        codes: Codes of the elements, of the shape of the data.
        scales: Codes of the scales; along the axis of the blocks, one for each block.
        tensor_scale: The float32 scale of the whole tensor, or several that broadcast to the shape
            of `scales`. None if there is none.
    """

    codes: Any
    scales: Any
    tensor_scale: Any


MXFP8_E4M3 = BlockFormat(parse("E4M3"), parse("E8M0"), 32)
MXFP8_E5M2 = BlockFormat(parse("E5M2"), parse("E8M0"), 32)
MXFP6_E2M3 = BlockFormat(parse("E2M3"), parse("E8M0"), 32)
MXFP6_E3M2 = BlockFormat(parse("E3M2"), parse("E8M0"), 32)
MXFP4 = BlockFormat(parse("E2M1"), parse("E8M0"), 32)
MXINT8 = BlockFormat(parse("E0M7"), parse("E8M0"), 32, twos_complement=True)
NVFP4 = BlockFormat(parse("E2M1"), parse("E4M3"), 16, ScaleRule.Max, tensor_scale=True)
PRESETS = {
    "MXFP8_E4M3": MXFP8_E4M3,
    "MXFP8_E5M2": MXFP8_E5M2,
    "MXFP6_E2M3": MXFP6_E2M3,
    "MXFP6_E3M2": MXFP6_E3M2,
    "MXFP4": MXFP4,
    "MXINT8": MXINT8,
    "NVFP4": NVFP4,
}
"""Block formats of OCP and NVIDIA by name."""


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
        >>> blocks = encode_blocks(np.array([[1.0, -3.0, 0.2], [0.0, 8.0, 100.0]]), MXFP4)
        >>> blocks.codes.tolist(), blocks.scales.tolist()
        ([[4, 15, 1], [0, 1, 7]], [[126], [131]])
    """
    fmt = as_block_format(fmt)
    axis = checked_axis(x, tuple(getattr(x, "shape", ())), axis)
    check_packable(x, fmt.element, packed)
    working = compute_dtype(float_dtype_of(x)).name
    xp, whole, numbers, divisors = _scales(x, fmt, axis, working, scales, tensor_scale)
    _check_nan(xp, numbers, fmt)
    with quiet():
        v = widened(x, float_dtype_named(working)) / divisors
        if scales is not None:  # a scale that is NaN makes its block NaN, with any codes
            v = xp.where(xp.isnan(divisors), 0.0, v)
        # A computed scale is already NaN, so any code will do if the element format has no NaN.
        codes = elementwise.encode(
            v,
            fmt.element,
            rounding=rounding,
            saturation=saturation,
            random=random,
            random_bits=random_bits,
            nan=0 if scales is None and fmt.scale.has_nan and not fmt.element.has_nan else None,
        )
    if fmt.twos_complement:
        codes = _twos_complement(xp, codes, fmt.element)
    if packed:
        codes = pack(codes, fmt.element.bits)
    return Blocks(
        codes, elementwise.encode(numbers, fmt.scale) if scales is None else scales, whole
    )


def rule_scales(x: Any, fmt: BlockFormat, axis: int, tensor_scale: Any) -> tuple[Any, Any]:
    """Give the codes of the scales by the rule of a format, and the tensor's scale.

    Args:
        x: As in `encode_blocks`, like `axis` and `tensor_scale`.
        fmt: The block format.
        axis: The axis, at least 0.
        tensor_scale: Scale of the whole tensor, or None to compute it.

    Raises:
        ValueError: If `x` contains NaN and the scale format has none.
    """
    working = compute_dtype(float_dtype_of(x)).name
    xp, whole, numbers, _ = _scales(x, fmt, axis, working, None, tensor_scale)
    _check_nan(xp, numbers, fmt)
    return elementwise.encode(numbers, fmt.scale), whole


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
    scales = elementwise.decode(blocks.scales, fmt.scale, dtype=working)
    if blocks.tensor_scale is not None:
        scales = scales * blocks.tensor_scale
    with quiet():
        values = _element_values(codes, fmt, working)
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
    working = compute_dtype(dtype)
    check_out(out, x)
    learning = needs_gradient(x, out=out)
    _, _, _, divisors = _scales(x, fmt, axis, working.name, scales, tensor_scale)
    with quiet():
        q = elementwise.quantize(
            widened(x, working) / divisors,
            fmt.element,
            rounding=rounding,
            saturation=saturation,
            random=random,
            random_bits=random_bits,
        )
        # For a scale of zero, the divisor is infinity and q is zero; their product would be NaN.
        y = cast(q * _where_finite(divisors), dtype.name)
    if learning:
        from fpformats.ops.gradients import straight_through

        return straight_through(y, x, None)
    return assigned(out, y)


def as_block_format(fmt: Any) -> BlockFormat:
    """Turn a block format or its name into the block format.

    Raises:
        TypeError: If it is neither.
        ValueError: If no preset has the name.
    """
    if isinstance(fmt, BlockFormat):
        return fmt
    if not isinstance(fmt, str):
        raise TypeError(f"fmt is {fmt!r}; it must be a BlockFormat, such as MXFP4, or a name")
    if fmt.upper() not in PRESETS:
        raise ValueError(f"fmt is {fmt!r}; block formats are {', '.join(PRESETS)}")
    return PRESETS[fmt.upper()]


def _scales(
    x: Any, fmt: BlockFormat, axis: int, working: str, codes: Any, tensor_scale: Any
) -> tuple[ModuleType, Any, Any, Any]:
    """Give the library, the tensor's scale, the blocks' scales, and the divisors of `x`.

    Codes of the scales and the tensor's scale may be given; None computes them.
    """
    xp = library_of(x)
    shape = list(x.shape)
    shape[axis] = -(-shape[axis] // fmt.size)
    whole = _given_tensor_scale(xp, x, fmt, shape, tensor_scale)
    if codes is None:
        scales, whole = _computed_scales(xp, x, fmt, axis, whole)
    else:
        _check_given(codes, x, fmt, shape, whole)
        scales = elementwise.decode(codes, fmt.scale, dtype="float64")
    with quiet():
        totals = cast(scales, working)
        if whole is not None:
            totals = totals * cast(whole, working)
    divisors = take_blocks(totals, fmt.size, axis, x.shape[axis])
    return xp, whole, scales, xp.where(divisors == 0, float("inf"), divisors)


def _computed_scales(
    xp: ModuleType, x: Any, fmt: BlockFormat, axis: int, tensor_scale: Any
) -> tuple[Any, Any]:
    """Give the scales that follow from the rule, and the tensor's scale, which may be given."""
    magnitudes = widened(x, float_dtype_named("float64"))
    magnitudes = abs(magnitudes) if fmt.element.signed else xp.clip(magnitudes, 0.0, None)
    largest = _block_maxima(xp, magnitudes, fmt.size, axis)
    by_max = fmt.rule in (ScaleRule.RCeil, ScaleRule.Max)
    quotients = largest / (fmt.element.max if by_max else 2.0**fmt.element.max_exponent)
    with quiet():
        if fmt.tensor_scale:
            tensor_scale = _tensor_scale(xp, largest, fmt) if tensor_scale is None else tensor_scale
            quotients = quotients / tensor_scale
        return elementwise.quantize(
            quotients, fmt.scale, rounding=_ROUNDINGS[fmt.rule]
        ), tensor_scale


def _check_nan(xp: ModuleType, scales: Any, fmt: BlockFormat) -> None:
    """Raise ValueError if scales are NaN but their format has none."""
    if not fmt.scale.has_nan and not is_hidden(scales) and bool(xp.isnan(scales).any()):
        raise ValueError(f"x contains NaN, which the scales' format {fmt.scale} does not have")


def _given_tensor_scale(
    xp: ModuleType, x: Any, fmt: BlockFormat, shape: list[int], tensor_scale: Any
) -> Any:
    """Give a tensor scale as float32 of the library of `x`, checked; None if none is given."""
    if tensor_scale is None:
        return None
    if not fmt.tensor_scale:
        raise ValueError(f"tensor_scale is {tensor_scale!r}; the format has none: it must be None")
    if is_tensor(tensor_scale) and not is_tensor(x):
        raise TypeError(f"tensor_scale is a {type(tensor_scale).__name__}; x is a NumPy array")
    on = {"device": x.device} if is_tensor(x) else {}
    scale = xp.asarray(tensor_scale, dtype=xp.float32, **on)
    ends = zip(reversed(scale.shape), reversed(shape), strict=False)
    if len(scale.shape) > len(shape) or any(size not in (1, wanted) for size, wanted in ends):
        raise ValueError(
            f"tensor_scale has shape {tuple(scale.shape)}, which does not broadcast to the shape "
            f"{tuple(shape)} of the scales"
        )
    if not is_hidden(scale) and not bool(((scale > 0) & (scale < float("inf"))).all()):
        raise ValueError("tensor_scale must be positive and finite")
    return scale


def _check_given(codes: Any, x: Any, fmt: BlockFormat, shape: list[int], whole: Any) -> None:
    """Raise an error unless codes of scales are of the library of `x`, and suit its blocks."""
    if is_tensor(codes) != is_tensor(x) or not (is_tensor(codes) or isinstance(codes, np.ndarray)):
        raise TypeError(f"scales is a {type(codes).__name__}; x is a {type(x).__name__}")
    if tuple(codes.shape) != tuple(shape):
        raise ValueError(f"scales has shape {tuple(codes.shape)}; x needs {tuple(shape)}")
    if fmt.tensor_scale and whole is None:
        raise ValueError("tensor_scale is None; scales of this format need the one they belong to")


def _tensor_scale(xp: ModuleType, largest: Any, fmt: BlockFormat) -> Any:
    """Give the scale that maps the largest magnitude to the largest element and block scale."""
    if 0 in largest.shape:
        return xp.ones_like(largest, dtype=xp.float32).sum() + 1
    # Products with a scale must stay finite, even if the data contain infinity.
    limit = float(np.finfo(np.float32).max) / fmt.scale.max
    largest = xp.where(xp.isnan(largest), 0.0, largest)  # NaN affects only its block
    scale = xp.clip(largest.max() / (fmt.element.max * fmt.scale.max), None, limit)
    rounded = xp.asarray(scale, dtype=xp.float32)
    return xp.where(rounded == 0, xp.ones_like(rounded), rounded)


def _block_maxima(xp: ModuleType, magnitudes: Any, size: int, axis: int) -> Any:
    rows = padded(xp, xp.swapaxes(magnitudes, axis, -1), size)
    grouped = rows.reshape(*rows.shape[:-1], rows.shape[-1] // size, size)
    largest = grouped.amax(-1) if is_tensor(grouped) else grouped.max(axis=-1)
    return xp.swapaxes(largest, -1, axis)


def _where_finite(divisors: Any) -> Any:
    return library_of(divisors).where(divisors == float("inf"), 0.0, divisors)


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
