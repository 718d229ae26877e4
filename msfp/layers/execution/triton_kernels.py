"""Products of quantized layers on a GPU: Triton kernels that multiply int8 numbers exactly.

Each program computes a tile of `block_m` rows and `block_n` output channels. It adds products in
int32, so the sums are exact in any order. Then it rounds three times, as the definition says. The
launch must forbid that a product is fused with a sum, by `enable_fp_fusion=False`. Arguments that
may be None, and those marked `tl.constexpr`, are fixed when a kernel is compiled.

A weight is int8, one row for each output channel. If there is a `table`, it is 4-bit codes instead,
two in a byte, the first one in the lower bits. The table has the 16 numbers of the codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(8)  # rows of tiles that are computed together


@triton.jit  # type: ignore[untyped-decorator]
def linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    table: tl.tensor,
    correction: tl.tensor,
    input_step: tl.tensor,
    weight_step: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    channels: tl.tensor,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Write the product of `x`, shape (rows, channels), and the weight to `out`."""
    tall, wide = _tile(rows, outputs, block_m, block_n)
    m = tall * block_m + tl.arange(0, block_m)
    n = wide * block_n + tl.arange(0, block_n)
    k = tl.arange(0, block_k)
    lines = x + m.to(tl.int64)[:, None] * channels
    total = tl.zeros((block_m, block_n), dtype=tl.int32)
    for first in range(0, channels, block_k):
        inside = (m < rows)[:, None] & (first + k < channels)[None, :]
        numbers = tl.load(lines + (first + k)[None, :], mask=inside, other=0)
        weights = _weights(
            weight, table, n, outputs, channels, first, channels - first, block_k
        )  # fmt: skip
        total = tl.dot(numbers, weights, total)
    _finish(total, m, n, rows, outputs, out, correction, input_step, weight_step, bias)


@triton.jit(do_not_specialize=("zero",))  # type: ignore[untyped-decorator]
def convolution_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    table: tl.tensor,
    correction: tl.tensor,
    input_step: tl.tensor,
    weight_step: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    zero: tl.tensor,
    kernel_height: tl.constexpr,
    kernel_width: tl.constexpr,
    stride_height: tl.constexpr,
    stride_width: tl.constexpr,
    top: tl.constexpr,
    left: tl.constexpr,
    dilation_height: tl.constexpr,
    dilation_width: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Write the convolution of `x`, shape (batch, height, width, channels), to `out`.

    A row of the weight has its channels last. `top` and `left` are the padding there. `zero` is
    the number in `x` that stands for zero, and is what the input is padded with.
    """
    tall, wide = _tile(rows, outputs, block_m, block_n)
    m = tall * block_m + tl.arange(0, block_m)
    n = wide * block_n + tl.arange(0, block_n)
    k = tl.arange(0, block_k)
    line = m // out_width
    image = line // out_height
    upper = (line - image * out_height) * stride_height - top
    leftmost = (m - line * out_width) * stride_width - left
    places: tl.constexpr = kernel_height * kernel_width
    steps = tl.cdiv(channels, block_k)
    total = tl.zeros((block_m, block_n), dtype=tl.int32)
    # One loop over the kernel and the channels, because Triton overlaps loads of the inner loop.
    for step in range(places * steps):
        place = step // steps
        first = (step - place * steps) * block_k
        i = upper + place // kernel_width * dilation_height
        j = leftmost + place % kernel_width * dilation_width
        inside = (m < rows) & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        pixels = (image.to(tl.int64) * height + i) * width + j
        numbers = tl.load(
            x + pixels[:, None] * channels + (first + k)[None, :],
            mask=inside[:, None] & (first + k < channels)[None, :],
            other=zero,
        )
        start = place * channels + first
        weights = _weights(
            weight, table, n, outputs, places * channels, start, channels - first, block_k
        )
        total = tl.dot(numbers, weights, total)
    _finish(total, m, n, rows, outputs, out, correction, input_step, weight_step, bias)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(
    rows: tl.tensor, outputs: tl.tensor, block_m: tl.constexpr, block_n: tl.constexpr
) -> tl.tensor:
    """Give the row and column of a program's tile.

    Programs that run at the same time compute a square of tiles. They share what they read.
    """
    tall = tl.cdiv(rows, block_m)
    wide = tl.cdiv(outputs, block_n)
    group = tl.program_id(0) // (GROUP * wide)
    within = tl.program_id(0) - group * GROUP * wide
    lines = tl.minimum(tall - group * GROUP, GROUP)
    return group * GROUP + within % lines, within // lines


@triton.jit  # type: ignore[untyped-decorator]
def _weights(
    weight: tl.tensor,
    table: tl.tensor,
    n: tl.tensor,
    outputs: tl.tensor,
    columns: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    block_k: tl.constexpr,
) -> tl.tensor:
    """Give `count` columns of the weight from `first` on, shape (block_k, block_n); then zeros.

    With codes, `columns`, `first` and `count` are even, and code 0 stands for 0.
    """
    rows = n.to(tl.int64) * columns + first
    if table is None:
        k = tl.arange(0, block_k)
        inside = (k < count)[:, None] & (n < outputs)[None, :]
        weights = tl.load(weight + rows[None, :] + k[:, None], mask=inside, other=0)
    else:
        pair = tl.arange(0, block_k // 2)
        inside = (n < outputs)[:, None] & (2 * pair < count)[None, :]
        codes = tl.load(weight + (rows // 2)[:, None] + pair[None, :], mask=inside, other=0)
        codes = codes.to(tl.int32)
        numbers = tl.interleave(_number(codes & 15, table), _number(codes >> 4, table))
        weights = tl.trans(numbers)
    return weights


@triton.jit  # type: ignore[untyped-decorator]
def _number(code: tl.tensor, table: tl.tensor) -> tl.tensor:
    """Look up the numbers of codes in two words of eight bytes, which stay in registers."""
    word = tl.where(code < 8, tl.load(table), tl.load(table + 1))
    return (word >> ((code & 7) * 8).to(tl.int64)).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(
    total: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    out: tl.tensor,
    correction: tl.tensor,
    input_step: tl.tensor,
    weight_step: tl.tensor,
    bias: tl.tensor,
) -> None:
    """Write the output of exact sums: each operation is rounded once."""
    known = n < outputs
    if correction is not None:
        total = total - tl.load(correction + n, mask=known, other=0)[None, :]
    y = total.to(tl.float32) * tl.load(input_step)
    y = y * tl.load(weight_step + n, mask=known, other=0.0)[None, :]
    if bias is not None:
        y = y + tl.load(bias + n, mask=known, other=0.0).to(tl.float32)[None, :]
    places = out + m.to(tl.int64)[:, None] * outputs + n[None, :]
    inside = (m < rows)[:, None] & known[None, :]
    tl.store(places, _narrowed(y, out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _narrowed(y: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round finite numbers to the nearest of a dtype, ties to even."""
    if dtype == tl.bfloat16:
        # By bit patterns, because Triton's interpreter truncates instead of rounding.
        pattern = y.to(tl.uint32, bitcast=True)
        pattern = (pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16
        narrow = pattern.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = y.to(dtype)
    return narrow
