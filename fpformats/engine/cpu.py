"""Compiled kernels on arrays and tensors in host memory, in one pass over memory.

`kernel_of` gives None if no compiled kernel takes the input: if the format is too wide, or a
tensor is on another device or under a transform of torch. The caller then uses whole-array
operations, which give the same bits.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fpformats.engine import memory
from fpformats.engine.arrays import cast, check_codes, contiguous, is_plain_tensor
from fpformats.engine.scales import Scales, lay_out
from fpformats.kernels import native
from fpformats.kernels.grid import FLOAT_DTYPES
from fpformats.kernels.plan import code_dtype
from fpformats.rounding import DEFAULT, Policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fpformats.formats import FloatFormat
    from fpformats.kernels.grid import FloatDtype

MAX_PACKED_BITS = 8
"""Widest codes that the kernels pack."""
CODE_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4}
"""Integer dtypes that the kernels read codes from, and their widths."""
MAX_REMEMBERED = 4096
MOST = 1 << 62
"""A number of elements that no array reaches."""
_enabled = True
_nearest_kernels: dict[tuple[FloatFormat | str, Any], Any] = {}


@contextmanager
def disabled() -> Iterator[None]:
    """Switch compiled kernels off inside a ``with`` block, to test the whole-array operations."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def is_enabled() -> bool:
    """Tell whether compiled kernels are used if there are any."""
    return _enabled


def kernel_of(
    x: Any,
    fmt: FloatFormat,
    dtype: FloatDtype,
    policy: Policy = DEFAULT,
    scales: Scales | None = None,
) -> Any:
    """Give the compiled kernel for values of a dtype; None if there is none that takes `x`."""
    others = (policy.random, *(scales[:2] if scales is not None else ()))
    if not _enabled or not _in_host_memory(x) or not all(map(_may_be_read, others)):
        return None
    return native.kernel_of(fmt, dtype, policy.rounding, policy.saturation)


def takes(x: Any) -> bool:
    """Tell whether a compiled kernel can read an array or tensor."""
    return _enabled and _in_host_memory(x) and native.library() is not None


def nearest(x: Any, fmt: FloatFormat | str, out: Any = None) -> Any:
    """Round by the default policy on the shortest path; None if the input needs the full path.

    Args:
        x: Anything. The short path takes contiguous arrays and tensors without a gradient, too
            small for threads to help, if `remember` has a kernel for the format and the dtype.
        fmt: The format.
        out: Where to write to, of the same kind, dtype and shape; None for a new result.

    Returns:
        A new array or tensor, `out`, or None.
    """
    if type(x) is np.ndarray:
        kernel = _nearest_kernels.get((fmt, x.dtype))
        if kernel is None or not x.flags.carray or x.size >= native.PARALLEL_FROM or not _enabled:
            return None
        y = np.empty_like(x) if out is None else out
        if out is not None and not (type(out) is np.ndarray and _is_like(out, x)):
            return None
        address = native.library().address
        kernel.quantize(address(x), address(y), x.size, 1, False)
        return y
    if not is_plain_tensor(x) or x.requires_grad or not x.is_contiguous():
        return None
    kernel, size = _nearest_kernels.get((fmt, x.dtype)), x.numel()
    if kernel is None or size >= native.PARALLEL_FROM or not _enabled:
        return None
    y = sys.modules["torch"].empty_like(x) if out is None else out
    if out is not None and not (is_plain_tensor(out) and _is_like(out, x)):
        return None
    kernel.quantize(x.data_ptr(), y.data_ptr(), size, 1, False)
    return y if out is None else memory.written(out, y)


def _is_like(out: Any, x: Any) -> bool:
    """Tell whether results can be written directly to `out`, and `out` is not to be refused."""
    if out.dtype != x.dtype or out.shape != x.shape:
        return False
    allowed = out.flags.writeable if isinstance(out, np.ndarray) else not out.requires_grad
    return bool(allowed) and memory.may_write(out, x, [], in_place=True)


def remember(kernel: Any, fmt: FloatFormat, dtype: Any) -> None:
    """Keep a kernel of the default policy for `nearest`."""
    if len(_nearest_kernels) >= MAX_REMEMBERED:
        _nearest_kernels.clear()
    _nearest_kernels[fmt, dtype] = kernel


def quantize(
    kernel: Any,
    x: Any,
    policy: Policy = DEFAULT,
    scales: Scales | None = None,
    out: Any = None,
) -> Any:
    """Round the elements of an array or tensor.

    Args:
        kernel: The result of `kernel_of` for `x`.
        x: Array or tensor of any strides.
        policy: The policy of the kernel.
        scales: Scales and zero points, or None.
        out: Array or tensor like `x` to write to; may be `x` or overlap it.

    Returns:
        `out`, or a new array or tensor.
    """
    source = _memory(x, in_order=scales is not None or policy.random is not None)
    held, scaling, random = _operands(scales, policy, tuple(source.shape))
    target = source if out is x else out
    if not memory.may_write(target, source, held, in_place=True):
        target = memory.empty_like(source)
    size = memory.size(source)
    kernel.quantize(
        memory.address(source),
        memory.address(target),
        size,
        native.threads_for(size),
        size * source.itemsize >= native.STREAM_FROM and target is not source,
        scaling,
        random,
    )
    return memory.written(out, target)


def encode(
    kernel: Any,
    x: Any,
    nan_code: int | None,
    bits: int,
    packed: bool = False,
    policy: Policy = DEFAULT,
    scales: Scales | None = None,
    out: Any = None,
) -> tuple[Any, int]:
    """Give the codes of the elements of an array or tensor.

    Args:
        kernel: The result of `kernel_of` for `x`.
        x: Array or tensor of any strides.
        nan_code: Code of NaN, None if there is none.
        bits: Width of a code.
        packed: Whether to pack the codes side by side, in a one-dimensional array of bytes.
        policy: The policy of the kernel.
        scales: Scales and zero points, or None.
        out: Where to write to, of the shape and dtype of the codes, or None.

    Returns:
        The codes; and the flags `native.NAN_IN` and `native.NAN_OUT` for NaN without a code.
    """
    source = _memory(x, in_order=True)
    size, dtype = memory.size(source), code_dtype(bits)
    held, scaling, random = _operands(scales, policy, tuple(source.shape))
    shape = (-(-size * bits // 8),) if packed else tuple(source.shape)
    codes = out
    if not memory.may_write(out, source, held, in_place=False):
        codes = memory.empty(source, shape, dtype)
    met = kernel.encode(
        memory.address(source),
        memory.address(codes),
        size,
        native.threads_for(size),
        -1 if nan_code is None else nan_code,
        CODE_BYTES[dtype],
        bits if packed else 0,
        scaling,
        random,
    )
    return memory.written(out, codes), met


def count_steps(
    kernel: Any,
    x: Any,
    offset: int,
    dtype: str,
    scales: Scales | None = None,
    out: Any = None,
) -> tuple[Any, int]:
    """Give the values of the elements of an array or tensor as numbers of steps.

    Args:
        kernel: The result of `kernel_of` for `x`.
        x: Array or tensor of any strides. A tensor keeps them if there is one scale.
        offset: What is added to each number.
        dtype: "uint8" or "int8".
        scales: Scales and zero points, or None.
        out: Where to write to, of the shape and dtype of the numbers, or None.

    Returns:
        The numbers; and the flag `native.NAN_IN` for NaN.
    """
    single = scales is None or memory.size(scales.scale) == 1
    source = _memory(x, in_order=not single or out is not None)
    held, scaling, _ = _operands(scales, DEFAULT, tuple(source.shape))
    steps = out
    if not memory.may_write(out, source, held, in_place=False):
        steps = memory.empty_like(source, dtype)
    size = memory.size(source)
    met = kernel.count_steps(
        memory.address(source),
        memory.address(steps),
        size,
        native.threads_for(size),
        offset,
        scaling,
    )
    return memory.written(out, steps), met


class StepCounter:
    """`count_steps` with one scale on the shortest path, for many calls.

    Args:
        fmt: The format.
        scale: The scale, which is rounded to float32.
        zero_point: Likewise, or None.
        offset: What is added to each number.
        dtype: "uint8" or "int8".
    """

    def __init__(
        self, fmt: FloatFormat, scale: float, zero_point: float | None, offset: int, dtype: str
    ) -> None:
        self._format, self._offset, self._dtype = fmt, offset, dtype
        self._numbers = np.array([scale, 0 if zero_point is None else zero_point], np.float32)
        self._has_zero_point = zero_point is not None
        self._kernels: dict[Any, Any] = {}

    def __call__(self, x: Any) -> Any:
        """Give the numbers; None if `x` needs the full path, as NaN does."""
        if not _in_host_memory(x) or not _enabled:
            return None
        kernel = self._kernels.get(x.dtype) or self._kernel_for(x)
        if kernel is None:
            return None
        source = _memory(x, in_order=False)
        if isinstance(source, np.ndarray):
            steps, size = np.empty(source.shape, self._dtype), source.size
            at, to = memory.address(source), memory.address(steps)
        else:
            torch = sys.modules["torch"]
            steps, size = torch.empty_like(source, dtype=getattr(torch, self._dtype)), x.numel()
            at, to = source.data_ptr(), steps.data_ptr()
        threads = 1 if size < native.PARALLEL_FROM else native.threads_for(size)
        return None if kernel(at, to, size, threads, self._offset, self._scaling) else steps

    def _kernel_for(self, x: Any) -> Any:
        """Give the kernel for the dtype of `x` and keep it; None if there is none."""
        name = str(x.dtype).removeprefix("torch.")
        if name not in FLOAT_DTYPES or name == "float64":  # whose scales are float64 too
            return None
        kernel = kernel_of(x, self._format, FLOAT_DTYPES[name])
        if kernel is None:
            return None
        start = memory.address(self._numbers)
        zero = start + self._numbers.itemsize if self._has_zero_point else 0
        self._scaling = native.library().Scaling(start, zero, MOST, MOST, 0)
        self._kernels[x.dtype] = kernel.count_steps
        return kernel.count_steps


def decode(
    kernel: Any,
    codes: Any,
    fmt: FloatFormat,
    dtype: FloatDtype,
    shape: tuple[int, ...],
    packed_bits: int = 0,
    scales: Scales | None = None,
    out: Any = None,
) -> Any:
    """Give the values of codes; None if one is out of range.

    Args:
        kernel: The result of `kernel_of` for `codes`.
        codes: Array or tensor of integers, or of bytes if the codes are packed.
        fmt: The format.
        dtype: Dtype of the result.
        shape: Shape of the result.
        packed_bits: Width of packed codes, 0 if they are not packed.
        scales: Scales and zero points, or None.
        out: Where to write to, of the shape and dtype of the values, or None.

    Returns:
        Values of the dtype, or None.
    """
    if (width := str(codes.dtype).removeprefix("torch.")) not in CODE_BYTES:
        check_codes(codes, fmt.bits, str(fmt))
        width = code_dtype(fmt.bits)
        codes = cast(codes, width)
    source, size = _memory(codes, in_order=True), math.prod(shape)
    held, scaling, _ = _operands(scales, DEFAULT, shape)
    values = out
    if not memory.may_write(out, source, held, in_place=False):
        values = memory.empty(source, shape, dtype.name)
    met = kernel.decode(
        memory.address(source),
        memory.address(values),
        size,
        native.threads_for(size),
        size * values.itemsize >= native.STREAM_FROM,
        CODE_BYTES[width],
        packed_bits,
        scaling,
    )
    return None if met else memory.written(out, values)


def differentiate(
    kernel: Any,
    x: Any,
    given: Any,
    policy: Policy,
    scales: Scales,
    wanted: tuple[bool, bool, bool],
    *,
    clip_gradient: bool,
) -> tuple[Any, Any, Any]:
    """Give the gradients of the inputs of `fpformats.quantize_scaled`, from that of its result.

    Args:
        kernel: The result of `kernel_of` for `x`.
        x: The tensor that was rounded, float32 or float64.
        given: The gradient of the result, of the shape and dtype of `x`.
        policy: How it was rounded.
        scales: Scales and zero points.
        wanted: Whether to compute the gradients of `x`, of the scale and of the zero point.
        clip_gradient: Whether the gradient of `x` is zero beyond the range of the format.

    Returns:
        Three gradients of the shape of `x`, or None where not wanted. Those of the scale and the
        zero point are not yet summed.
    """
    source, gradient = contiguous(x.detach()), contiguous(given)
    held, scaling, random = _operands(scales, policy, tuple(source.shape))
    results = [memory.empty_like(source) if wants else None for wants in wanted]
    size = memory.size(source)
    kernel.differentiate(
        memory.address(source),
        memory.address(gradient),
        *(0 if result is None else memory.address(result) for result in results),
        clip_gradient,
        size,
        native.threads_for(size),
        scaling,
        random,
    )
    del held  # alive until here
    return results[0], results[1], results[2]


def errors(
    x: NDArray[Any],
    weights: NDArray[np.float64] | None,
    fmt: FloatFormat,
    scales: NDArray[Any],
    zero_points: NDArray[Any] | None,
) -> NDArray[np.float64] | None:
    """Give the weighted sum of squared errors of quantized rows; None without a kernel.

    Args:
        x: Data, shape (rows, length), float32 or float64.
        weights: Weights of the shape of `x`, None for 1.
        fmt: The format.
        scales: Candidates for each row, shape (rows, candidates), of the dtype of `x`.
        zero_points: Of the same shape and dtype, or None.

    Returns:
        Shape (rows, candidates), float64.
    """
    return _attempt(x, weights, fmt, scales, zero_points, sums=False)


def sums(
    x: NDArray[Any],
    weights: NDArray[np.float64] | None,
    fmt: FloatFormat,
    scale: NDArray[Any],
    zero_point: NDArray[Any] | None,
) -> NDArray[np.float64] | None:
    """Give the sums for a least-squares fit of quantized rows; None without a kernel.

    Args:
        x: As in `errors`.
        weights: As in `errors`.
        fmt: The format.
        scale: The scale of each row, shape (rows,).
        zero_point: The zero point of each row, shape (rows,), or None.

    Returns:
        Shape (6, rows), float64: sums of w, w q, w q**2, w x, w x q and w x**2. Here w is the
        weight, and q the value of the format that x rounds to.
    """
    zero_points = None if zero_point is None else zero_point[:, None]
    found = _attempt(x, weights, fmt, scale[:, None], zero_points, sums=True)
    return None if found is None else found.T


def _attempt(
    x: NDArray[Any],
    weights: NDArray[np.float64] | None,
    fmt: FloatFormat,
    scales: NDArray[Any],
    zero_points: NDArray[Any] | None,
    *,
    sums: bool,
) -> NDArray[np.float64] | None:
    kernel = kernel_of(x, fmt, FLOAT_DTYPES[x.dtype.name])
    if kernel is None:
        return None
    arrays = [x, weights, scales, zero_points]
    held = [None if array is None else np.ascontiguousarray(array) for array in arrays]
    rows, weight, scale, zero = (0 if array is None else memory.address(array) for array in held)
    count, candidates = scales.shape
    out = np.empty((count, 6) if sums else (count, candidates))
    threads = native.threads_for(x.size * candidates)
    kernel.attempt(
        *(
            rows,
            weight,
            scale,
            zero,
            count,
            x.shape[1],
            candidates,
            memory.address(out),
            sums,
            threads,
        )
    )
    return out


def moments(
    numbers: NDArray[np.float32], low_bits: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]] | None:
    """Give a histogram of bit patterns by their high bits, and moments of the low bits, or None.

    Args:
        numbers: One-dimensional and contiguous.
        low_bits: Number of low bits that a bin ignores.

    Returns:
        The nonempty bins in ascending order; and for each bin the count, the sum of the low bits
        and the sum of their squares, shape (3, bins).
    """
    if not _enabled or native.library() is None:
        return None
    bins, found = native.library().moments(memory.address(numbers), numbers.size, low_bits)
    return bins, found.T


def _in_host_memory(x: Any) -> bool:
    return type(x) in memory.ARRAYS or is_plain_tensor(x)


def _may_be_read(operand: Any) -> bool:
    return operand is None or isinstance(operand, int) or _in_host_memory(operand)


def _memory(x: Any, in_order: bool) -> Any:
    """Give an array or tensor without gaps, in row-major order if `in_order` is True."""
    if type(x) not in memory.ARRAYS and x.is_contiguous():  # the shortest path for tensors
        return x
    return x if not in_order and _is_channels_last(x) else contiguous(x)


def _is_channels_last(x: Any) -> bool:
    if x.ndim != 4 or isinstance(x, np.ndarray):
        return False
    return bool(x.is_contiguous(memory_format=sys.modules["torch"].channels_last))


def _operands(
    scales: Scales | None, policy: Policy, shape: tuple[int, ...]
) -> tuple[Any, Any, Any]:
    """Give the arrays to keep alive, and the addresses of scales and random words."""
    held: list[Any] = []
    scaling = random = None
    if scales is not None:
        scale, zero_point, layout = lay_out(scales, shape)
        held += [scale, zero_point]
        zero = 0 if zero_point is None else memory.address(zero_point)
        scaling = native.library().Scaling(memory.address(scale), zero, *layout)
    if policy.random is not None:
        words = policy.random
        if not isinstance(words, int):
            words = contiguous(cast(words, "int64"))
            held.append(words)
        seed, address = (words, 0) if isinstance(words, int) else (0, memory.address(words))
        random = native.library().Random(address, seed, policy.random_bits)
    return held, scaling, random
