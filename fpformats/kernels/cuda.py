"""Rounding, encoding and decoding of CUDA tensors, each in one launch of a Triton kernel.

Importing this module imports torch and Triton, and fails without Triton 3.6 or later. Callers pass
contiguous tensors, checked arguments, and plans made for the dtype of the values: float64 is
computed in float64, the others in float32. No function here waits for the device.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl

from fpformats.kernels import triton_kernels
from fpformats.kernels.plan import code_dtype

if TYPE_CHECKING:
    from fpformats.kernels.layout import Layout
    from fpformats.kernels.plan import Plan

BLOCK = 1024  # elements of a program
PACKED_BITS = (4, 6)


class Scaling(NamedTuple):
    """Scales and zero points, and which element has which.

    Attributes:
        scales: Contiguous tensor of the compute dtype, on the same device.
        zero_points: As `scales`, the same number of them; None for no shift.
        layout: Which element has which.
    """

    scales: torch.Tensor
    zero_points: torch.Tensor | None
    layout: Layout


def quantize(
    x: torch.Tensor,
    plan: Plan,
    out: torch.Tensor,
    *,
    scaling: Scaling | None = None,
    random: torch.Tensor | int | None = None,
    random_bits: int = 32,
) -> torch.Tensor:
    """Round to the values of a format, scaled and shifted if there are scales.

    Args:
        x: Contiguous tensor of any dtype.
        plan: The format and the policy.
        out: Contiguous tensor of the shape and dtype of `x` to write to; may be `x`.
        scaling: The scales, if any.
        random: For the stochastic modes, the seed or int64 words of the shape of `x`.
        random_bits: Width of the random words.

    Returns:
        `out`.
    """
    _launch(
        triton_kernels.quantize_kernel,
        x,
        out,
        x.numel(),
        record=_rounding_record(plan, x.device),
        **_scaling_arguments(scaling, x.numel()),
        **_random_arguments(random, random_bits),
        rounding=plan.rounding,
        narrow=plan.is_narrow,
    )
    return out


def encode(
    x: torch.Tensor,
    plan: Plan,
    nan_code: int | None,
    *,
    packed_bits: int | None = None,
    scaling: Scaling | None = None,
    random: torch.Tensor | int | None = None,
    random_bits: int = 32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round to the codes of a format, after a shift and a division if there are scales.

    Args:
        x: Contiguous tensor of any dtype.
        plan: The format and the policy.
        nan_code: Code to give for NaN; None if there is none.
        packed_bits: 4 or 6 to store codes of at most that width side by side, as
            `fpformats.pack` does without an axis.
        scaling: As in `quantize`.
        random: As in `quantize`.
        random_bits: As in `quantize`.

    Returns:
        The codes, in the smallest unsigned dtype and the shape of `x`, or as bytes if packed.
        Then, if there is no code for NaN, an int32 on the device: 0 if there was no NaN, 1 if
        there was NaN in the result, 2 if there was NaN in the input. Otherwise None.
    """
    nan_seen = torch.zeros((), dtype=torch.int32, device=x.device) if nan_code is None else None
    if packed_bits is None:
        codes = torch.empty(x.shape, dtype=_code_dtype(plan), device=x.device)
    else:
        size = -(-x.numel() * packed_bits // 8)
        codes = torch.empty(size, dtype=torch.uint8, device=x.device)
    _launch(
        triton_kernels.encode_kernel,
        x,
        codes,
        x.numel(),
        record=_rounding_record(plan, x.device),
        **_scaling_arguments(scaling, x.numel()),
        **_random_arguments(random, random_bits),
        nan_code=_signed(nan_code or 0),
        nan_seen=nan_seen,
        size=codes.numel(),
        rounding=plan.rounding,
        narrow=plan.is_narrow,
        packed_bits=packed_bits,
    )
    return codes, nan_seen


def count_steps(
    x: torch.Tensor,
    plan: Plan,
    offset: int,
    dtype: torch.dtype,
    *,
    scaling: Scaling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to a format, and give the values as numbers of steps.

    Args:
        x: Contiguous tensor of any dtype.
        plan: The format and the default policy.
        offset: What is added to each number.
        dtype: uint8 or int8.
        scaling: As in `quantize`.

    Returns:
        The numbers, in the shape of `x`; and an int32 on the device, 1 if there was NaN, else 0.
    """
    nan_seen = torch.zeros((), dtype=torch.int32, device=x.device)
    steps = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(
        triton_kernels.count_steps_kernel,
        x,
        steps,
        x.numel(),
        record=_rounding_record(plan, x.device),
        **_scaling_arguments(scaling, x.numel()),
        per_unit=1 / plan.quantum,
        step_offset=offset,
        nan_seen=nan_seen,
        rounding=plan.rounding,
        narrow=plan.is_narrow,
    )
    return steps, nan_seen


def decode(
    codes: torch.Tensor,
    plan: Plan,
    out: torch.Tensor,
    *,
    packed_bits: int | None = None,
    scaling: Scaling | None = None,
) -> torch.Tensor:
    """Give the values of codes, scaled and shifted if there are scales.

    Args:
        codes: Contiguous tensor of any integer dtype; bytes if the codes are packed.
        plan: The format.
        out: Contiguous tensor to write to, of any dtype, with one element for each code.
        packed_bits: 4 or 6 if codes of that width are stored side by side.
        scaling: As in `quantize`.

    Returns:
        `out`.
    """
    _launch(
        triton_kernels.decode_kernel,
        codes,
        out,
        out.numel(),
        record=_decoding_record(plan, out.device),
        **_scaling_arguments(scaling, out.numel()),
        narrow=plan.is_narrow,
        packed_bits=packed_bits,
    )
    return out


def _launch(kernel: Any, x: torch.Tensor, out: torch.Tensor, count: int, **arguments: Any) -> None:
    if count == 0:
        return
    grid = (-(-count // BLOCK),)
    with torch.cuda.device_of(x):
        kernel[grid](x, out, count, **arguments, block=BLOCK, enable_fp_fusion=False)


def _scaling_arguments(scaling: Scaling | None, count: int) -> dict[str, Any]:
    """Describe the layout, without the divisions that it does not need."""
    index = tl.uint32 if count < 1 << 32 else tl.int64
    scales, zero_points, layout = scaling or (None, None, None)
    row_length, run_length, row_stride = layout or (None, None, None)
    if layout is not None:
        is_aligned = layout.row_length == layout.run_length * layout.row_stride
        if is_aligned or layout.row_length >= count:
            row_length = row_stride = None
            run_length = None if layout.run_length >= count else layout.run_length
    return {
        "scales": scales,
        "zero_points": zero_points,
        "row_length": row_length,
        "run_length": run_length,
        "row_stride": row_stride,
        "index": index,
    }


def _random_arguments(random: torch.Tensor | int | None, bits: int) -> dict[str, Any]:
    if isinstance(random, int):
        words, low, high = None, _signed(random & 0xFFFFFFFF), _signed(random >> 32)
    else:
        words, low, high = random, None, None
    return {"words": words, "seed_low": low, "seed_high": high, "random_bits": bits}


def _signed(number: int) -> int:
    """Give the int32 of the same bits.

    Triton takes the type of an argument from its value; this way, all have one type.
    """
    return number - ((number >> 31) << 32)


def _code_dtype(plan: Plan) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, code_dtype(plan.magnitude_bits + plan.signed))
    return dtype


@functools.cache
def _rounding_record(plan: Plan, device: torch.device) -> torch.Tensor:
    fields = _narrow_fields(plan) if plan.is_narrow else _wide_fields(plan)
    return torch.tensor(fields, dtype=torch.int64, device=device)


def _narrow_fields(plan: Plan) -> list[int]:
    """Give the record in the order of `_round_narrow`."""
    return [
        _pattern32(plan.low),
        _pattern32(plan.high),
        _pattern32(plan.floor),
        # Added to the exponent bits of 2**e, this makes 1.5 * 2**(23 - digits) * 2**e.
        (23 - plan.digits << 23) | 1 << 22,
        int(plan.digits == 0),
        plan.digits,
        -1 << 31 if plan.signed else 0,
        -1 << 31 if plan.negative_zero else 0,
        1 << plan.magnitude_bits if plan.signed else 0,
    ]


def _wide_fields(plan: Plan) -> list[int]:
    """Give the record in the order of `_round_wide` and `_saturated`."""
    step_of_one = math.ldexp(1.0, -plan.digits)
    leading = math.ldexp(1.0, math.frexp(plan.smallest)[1] - 1)
    zero_code = 0 if plan.zero else -1
    keeps_sign_of_code_0 = plan.negative_zero or (plan.signed and not plan.zero)
    edges = zip(plan.edges, plan.edge_codes, strict=True)
    return [
        _pattern64(plan.high + plan.ceiling * step_of_one),
        _pattern64(plan.floor),
        _pattern64(plan.ceiling),
        _pattern64(1 / step_of_one),
        _pattern64(step_of_one),
        plan.digits,
        plan.code_base,
        _pattern64(plan.smallest),
        _pattern64(1 / leading if plan.smallest else 0.0),
        _pattern64(plan.smallest / leading - 1 if plan.smallest else 0.0),
        zero_code,
        plan.max_code,
        plan.max_code if plan.signed else zero_code,
        -1 << 63 if plan.signed else 0,
        -1 << 63 if keeps_sign_of_code_0 else 0,
        1 << plan.magnitude_bits if plan.signed else 0,
        *(field for value, code in edges for field in (_pattern64(value), code)),
    ]


@functools.cache
def _decoding_record(plan: Plan, device: torch.device) -> torch.Tensor:
    """Give the record in the order of `_decode`."""
    narrow = plan.is_narrow
    width, bias = (23, 127) if narrow else (52, 1023)
    sign = 1 << plan.magnitude_bits
    fields = [
        sign - 1,
        sign if plan.signed else 0,
        plan.linear,
        _pattern32(plan.quantum) if narrow else _pattern64(plan.quantum),
        plan.pattern_offset + (bias - 1023 << plan.mantissa_bits),
        width - plan.mantissa_bits,
        plan.infinite_code,
        plan.first_nan if plan.first_nan >= 0 else sign,
        sign if plan.nan_is_negative_zero else -1,
    ]
    return torch.tensor(fields, dtype=torch.int64, device=device)


def _pattern32(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little", signed=True)


def _pattern64(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)
