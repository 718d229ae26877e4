"""The common entry of every operation, which runs the fastest kernel that takes the input.

These are compiled kernels for host memory, Triton kernels for CUDA devices, and whole-array
operations for everything else. All give the same bits, so nobody needs to choose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fpformats.engine import cpu, cuda
from fpformats.engine.arrays import (
    as_array,
    assigned,
    cast,
    check_codes,
    compute_dtype,
    float_dtype_of,
    is_batched,
    is_hidden,
    is_tensor,
    library_of,
    narrowed,
    quiet,
    shaped,
    widened,
)
from fpformats.engine.bit_packing import pack, unpack
from fpformats.engine.scales import Scales, spread
from fpformats.kernels import philox, portable
from fpformats.kernels import policy as policies
from fpformats.kernels.native import NAN_IN
from fpformats.kernels.plan import code_dtype
from fpformats.rounding import DEFAULT, Policy

if TYPE_CHECKING:
    from fpformats.formats import FloatFormat
    from fpformats.kernels.grid import FloatDtype, Grid


def quantize(
    x: Any,
    fmt: FloatFormat,
    grid: Grid,
    policy: Policy = DEFAULT,
    scales: Scales | None = None,
    out: Any = None,
) -> Any:
    """Round to values of a format, scaled or not.

    Args:
        x: Array, tensor or number.
        fmt: The format.
        grid: The kernel parameters of the format in the compute dtype.
        policy: How to round.
        scales: Scales and zero points, or None.
        out: Where to write to, or None.

    Returns:
        Values of the kind, shape and dtype of `x`, or `out`.
    """
    array, dtype = as_array(x), float_dtype_of(x)
    if (kernel := cpu.kernel_of(array, fmt, dtype, policy, scales)) is not None:
        if policy is DEFAULT and scales is None:
            cpu.remember(kernel, fmt, array.dtype)
        y = cpu.quantize(kernel, array, policy, scales, out)
        return y if array is x or out is not None else shaped(y, x)
    if (plan := cuda.plan_of(x, fmt, dtype, policy, scales)) is not None:
        return cuda.quantize(plan, x, policy, scales, out)
    with quiet():
        v = unscaled(widened(x, compute_dtype(dtype)), scales)
        return narrowed(rescaled(rounded(v, grid, policy), scales), x, out)


def encode(
    x: Any,
    fmt: FloatFormat,
    grid: Grid,
    policy: Policy,
    nan_code: int | None,
    packed: bool = False,
    scales: Scales | None = None,
    out: Any = None,
) -> Any:
    """Round to codes of a format, scaled or not.

    Args:
        x: Array, tensor or number.
        fmt: The format.
        grid: The kernel parameters of the format in the compute dtype.
        policy: How to round.
        nan_code: Code of NaN, None if there is none.
        packed: Whether to pack the codes side by side.
        scales: Scales and zero points, or None.
        out: Where to write to, or None.

    Returns:
        Codes in the smallest unsigned dtype, of the kind and shape of `x`, or packed.

    Raises:
        ValueError: If there is NaN without a code for it.
    """
    array, dtype = as_array(x), float_dtype_of(x)
    if (kernel := cpu.kernel_of(array, fmt, dtype, policy, scales)) is not None:
        in_one_pass = packed and fmt.bits <= cpu.MAX_PACKED_BITS
        target = out if in_one_pass or not packed else None
        codes, met = cpu.encode(
            kernel, array, nan_code, fmt.bits, in_one_pass, policy, scales, target
        )
        codes = codes if array is x or packed or target is not None else shaped(codes, x)
    elif (plan := cuda.plan_of(x, fmt, dtype, policy, scales)) is not None:
        in_one_pass = packed and cuda.packs(fmt.bits)
        bits = fmt.bits if in_one_pass else None
        codes, met = cuda.encode(plan, x, nan_code, bits, policy, scales)
    else:
        codes = shaped(_encode_whole(x, fmt, grid, policy, nan_code, scales), x)
        in_one_pass, met = False, 0
    if met:
        raise _no_code(fmt, policy, bool(met & NAN_IN))
    return assigned(out, pack(codes, fmt.bits) if packed and not in_one_pass else codes)


def _encode_whole(
    x: Any,
    fmt: FloatFormat,
    grid: Grid,
    policy: Policy,
    nan_code: int | None,
    scales: Scales | None,
) -> Any:
    """Round to codes in whole-array operations."""
    dtype = float_dtype_of(x)
    with quiet():
        v = unscaled(widened(x, compute_dtype(dtype)), scales)
        values = rounded(v, grid, policy)
        if nan_code is None:
            _refuse_nan(v, values, fmt, policy)
        codes = portable.encode(library_of(x), values, grid, nan_code)
    return cast(codes, code_dtype(fmt.bits))


def count_steps(
    x: Any,
    fmt: FloatFormat,
    grid: Grid,
    offset: int,
    dtype: str,
    scales: Scales | None = None,
    out: Any = None,
) -> Any:
    """Round to values of a format, and give them as numbers of steps.

    Args:
        x: Array, tensor or number.
        fmt: The format.
        grid: The kernel parameters of the format in the compute dtype.
        offset: What is added to each number.
        dtype: "uint8" or "int8".
        scales: Scales and zero points, or None.
        out: Where to write to, or None.

    Returns:
        Integers of the kind and shape of `x`, or `out`.

    Raises:
        ValueError: If there is NaN (not checked under torch.compile).
    """
    array, of = as_array(x), float_dtype_of(x)
    if (kernel := cpu.kernel_of(array, fmt, of, DEFAULT, scales)) is not None:
        target = out if array is x else None
        steps, met = cpu.count_steps(kernel, array, offset, dtype, scales, target)
        if met:
            raise _no_steps()
    elif (plan := cuda.plan_of(x, fmt, of, scales=scales)) is not None:
        steps, met = cuda.count_steps(plan, x, offset, dtype, scales)
        if met:
            raise _no_steps()
    else:
        with quiet():
            values = rounded(unscaled(widened(x, compute_dtype(of)), scales), grid, DEFAULT)
        if not is_hidden(values) and bool(library_of(values).isnan(values).any()):
            raise _no_steps()
        values *= 1 / grid.quantum  # a power of two, so that the product is exact
        values += offset
        steps = cast(values, dtype)
    return assigned(out, steps if array is x else shaped(steps, x))


def _no_steps() -> ValueError:
    return ValueError("x contains NaN, which is no number of steps")


def decode(
    codes: Any,
    fmt: FloatFormat,
    grid: Grid,
    dtype: FloatDtype,
    shape: tuple[int, ...] | None,
    scales: Scales | None = None,
    out: Any = None,
) -> Any:
    """Give the values of codes, scaled or not.

    Args:
        codes: Array or tensor of integers, or an int.
        fmt: The format.
        grid: The kernel parameters of the format in the compute dtype.
        dtype: Dtype of the result.
        shape: Shape of packed codes; None for codes that are not packed.
        scales: Scales and zero points, or None.
        out: Where to write to, or None.

    Returns:
        Values of the kind and shape of `codes`; packed codes give values of `shape`.

    Raises:
        TypeError: If `codes` are not integers.
        ValueError: If one is out of range.
    """
    kernel = cpu.kernel_of(codes, fmt, dtype, scales=scales)
    plan = cuda.plan_of(codes, fmt, dtype, scales=scales)
    packs = kernel is not None and fmt.bits <= cpu.MAX_PACKED_BITS
    packs = packs or (plan is not None and cuda.packs(fmt.bits))
    if shape is not None and not packs:
        codes, shape = unpack(codes, fmt.bits, shape=shape), None
    wanted = tuple(getattr(codes, "shape", ())) if shape is None else shape
    packed_bits = None if shape is None else fmt.bits
    if kernel is not None:
        values = cpu.decode(kernel, codes, fmt, dtype, wanted, packed_bits or 0, scales, out)
        if values is not None:
            return values
    if packed_bits is None:
        check_codes(codes, fmt.bits, str(fmt))
    if plan is not None:
        values = cuda.decode(plan, codes, dtype, wanted, packed_bits, scales)
        return assigned(out, values)
    with quiet():
        integers = _as_integers(codes, compute_dtype(dtype).name.replace("float", "int"))
        values = rescaled(portable.decode(library_of(codes), integers, grid), scales)
        return assigned(out, shaped(cast(values, dtype.name), codes))


def rounded(x: Any, grid: Grid, policy: Policy) -> Any:
    """Round in whole-array operations, on a faster path for the default policy.

    Args:
        x: Array of the grid's dtype.
        grid: The format.
        policy: How to round.

    Returns:
        A new array of the shape and dtype of `x`.
    """
    xp = library_of(x)
    # The faster path works in place, which vmap does not allow.
    if policy.is_default and not is_batched(x):
        return portable.quantize(xp, x, grid)
    words, bits = policy.random, policy.random_bits
    if isinstance(words, int):
        words = philox.random_words(xp, x, words, bits)
    elif words is not None:
        words = cast(words, "int64").reshape(x.shape)
    edges = policies.make_edges(grid, policy.rounding, policy.saturation)
    return policies.quantize(xp, x, grid, policy.rounding, edges, words, bits)


def unscaled(x: Any, scales: Scales | None) -> Any:
    """Give (x - zero_point) / scale, or `x` itself without scales."""
    if scales is None:
        return x
    scale, zero_point = spread(scales, tuple(x.shape))
    if zero_point is None:
        return x / scale
    v = x - zero_point
    if is_hidden(scale):
        return v / scale  # vmap may give the scale a dimension that v lacks
    v /= scale
    return v


def rescaled(q: Any, scales: Scales | None) -> Any:
    """Give scale * q + zero_point, in place, or `q` itself without scales."""
    if scales is None:
        return q
    scale, zero_point = spread(scales, tuple(q.shape))
    q *= scale
    if zero_point is not None:
        q += zero_point
    return q


def _refuse_nan(x: Any, values: Any, fmt: FloatFormat, policy: Policy) -> None:
    if is_hidden(values):
        raise ValueError(
            f"nan is None, and {fmt} has no NaN: torch.compile and vmap need nan= as a code"
        )
    xp = library_of(values)
    if bool(xp.isnan(values).any()):
        raise _no_code(fmt, policy, bool(xp.isnan(x).any()))


def _no_code(fmt: FloatFormat, policy: Policy, in_x: bool) -> ValueError:
    if in_x:
        return ValueError(f"x contains NaN, which {fmt} has no code for; nan= gives it one")
    return ValueError(
        f"x goes beyond {fmt}, which {policy.saturation} makes NaN, and {fmt} has no code for "
        "NaN; nan= gives it one"
    )


def _as_integers(codes: Any, dtype: str) -> Any:
    if is_tensor(codes):
        return cast(codes, dtype)
    # Through the unsigned type, so that an int beyond the signed range wraps as arrays do.
    unsigned = np.asarray(codes, dtype=f"u{dtype}") if isinstance(codes, int) else codes
    return np.atleast_1d(unsigned).astype(dtype)
