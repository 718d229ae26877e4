"""Rounding, encoding and decoding on a GPU: Triton kernels of one pass over memory.

Each program takes `block` elements of a contiguous tensor. The format is in the `record`, a tensor
of int64 numbers and bit patterns of floats. `fpformats.kernels.cuda` writes it in the order in
which it is read here. All formats thus share the compiled kernels. Arguments that may be None, and
those marked `tl.constexpr`, are fixed when a kernel is compiled.

The kernels rely on properties that the tests check in the generated GPU code: float32 keeps
subnormal numbers, no product is fused with a sum (the launch forbids it), `tl.div_rn` divides
float32 as IEEE 754 does (`/` does so only for float64), and narrowing rounds to nearest even.
Before version 3.6, Triton's `tl.div_rn` treated subnormal numbers as zero. Devices differ in the
minimum and maximum of NaN; the kernels use comparisons instead, which are false for NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(f"Triton is version {triton.__version__}; the kernels need 3.6 or later")

# For arguments not listed here, Triton compiles extra kernels for 1 and for multiples of 16.
PLAIN_NUMBERS = (
    "row_length",
    "run_length",
    "row_stride",
    "seed_low",
    "seed_high",
    "random_bits",
    "nan_code",
)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def quantize_kernel(
    x: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    record: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    row_length: tl.tensor,
    run_length: tl.tensor,
    row_stride: tl.tensor,
    words: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    random_bits: tl.tensor,
    rounding: tl.constexpr,
    narrow: tl.constexpr,
    index: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write the rounded values of `x` to `out`, scaled and shifted if there are scales."""
    offsets = _offsets(block)
    inside = offsets < count
    v = _widened(tl.load(x + offsets, mask=inside, other=0.0))
    if scales is not None:
        scale, zero_point = _scale_at(
            offsets, inside, scales, zero_points, row_length, run_length, row_stride, index
        )
        v = _unscaled(v, scale, zero_point, zero_points is not None)
    word = _random_word(offsets, inside, words, seed_low, seed_high, random_bits)
    y, _ = _round(v, record, word, random_bits, rounding, narrow)
    if scales is not None:
        y = _rescaled(y, scale, zero_point, zero_points is not None)
    tl.store(out + offsets, _narrowed(y, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def encode_kernel(
    x: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    record: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    row_length: tl.tensor,
    run_length: tl.tensor,
    row_stride: tl.tensor,
    words: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    random_bits: tl.tensor,
    nan_code: tl.tensor,
    nan_seen: tl.tensor,
    size: tl.tensor,
    rounding: tl.constexpr,
    narrow: tl.constexpr,
    packed_bits: tl.constexpr,
    index: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write the codes of `x` to `out`, packed side by side if `packed_bits` is their width.

    `nan_seen` becomes 1 if there is NaN in the result, and 2 if there is NaN in the input.
    """
    offsets = _offsets(block)
    inside = offsets < count
    v = _widened(tl.load(x + offsets, mask=inside, other=0.0))
    if scales is not None:
        scale, zero_point = _scale_at(
            offsets, inside, scales, zero_points, row_length, run_length, row_stride, index
        )
        v = _unscaled(v, scale, zero_point, zero_points is not None)
    word = _random_word(offsets, inside, words, seed_low, seed_high, random_bits)
    _, code = _round(v, record, word, random_bits, rounding, narrow)
    if nan_seen is not None:
        seen = tl.max(tl.where(inside & (code < 0), 1 + (v != v).to(tl.int32), 0), axis=0)
        tl.atomic_max(nan_seen, seen, mask=seen > 0)
    code = tl.where(code < 0, nan_code, code)
    if packed_bits is None:
        tl.store(out + offsets, code.to(out.dtype.element_ty), mask=inside)
    else:
        _store_packed(out, tl.where(inside, code, 0), size, packed_bits, block)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def count_steps_kernel(
    x: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    record: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    row_length: tl.tensor,
    run_length: tl.tensor,
    row_stride: tl.tensor,
    per_unit: tl.tensor,
    step_offset: tl.tensor,
    nan_seen: tl.tensor,
    rounding: tl.constexpr,
    narrow: tl.constexpr,
    index: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write the values of `x` as numbers of steps to `out`; `nan_seen` becomes 1 if there is NaN.

    `per_unit` is the number of steps in 1, which is a power of two.
    """
    offsets = _offsets(block)
    inside = offsets < count
    v = _widened(tl.load(x + offsets, mask=inside, other=0.0))
    if scales is not None:
        scale, zero_point = _scale_at(
            offsets, inside, scales, zero_points, row_length, run_length, row_stride, index
        )
        v = _unscaled(v, scale, zero_point, zero_points is not None)
    y, code = _round(v, record, 0, 0, rounding, narrow)
    seen = tl.max((inside & (code < 0)).to(tl.int32), axis=0)
    tl.atomic_max(nan_seen, seen, mask=seen > 0)
    steps = tl.where(code < 0, 0.0, y * per_unit).to(tl.int32) + step_offset
    tl.store(out + offsets, steps.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def decode_kernel(
    codes: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    record: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    row_length: tl.tensor,
    run_length: tl.tensor,
    row_stride: tl.tensor,
    narrow: tl.constexpr,
    packed_bits: tl.constexpr,
    index: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write the values of `codes` to `out`, scaled and shifted if there are scales."""
    offsets = _offsets(block)
    inside = offsets < count
    if packed_bits is None:
        code = tl.load(codes + offsets, mask=inside, other=0)
    else:
        code = _load_packed(codes, offsets, inside, packed_bits)
    y = _decode(code, record, narrow)
    # Through float32, which holds all values of the narrower dtypes.
    y = y if out.dtype.element_ty == tl.float64 else y.to(tl.float32)
    if scales is not None:
        scale, zero_point = _scale_at(
            offsets, inside, scales, zero_points, row_length, run_length, row_stride, index
        )
        y = _rescaled(y, scale, zero_point, zero_points is not None)
    tl.store(out + offsets, _narrowed(y, out.dtype.element_ty), mask=inside)


@triton.jit
def _offsets(block: tl.constexpr) -> tl.tensor:
    """Give the indices of a program's elements, in 64 bits: there may be more than 2**31."""
    return tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)


@triton.jit
def _widened(x: tl.tensor) -> tl.tensor:
    """Convert values to the compute dtype."""
    if x.dtype == tl.bfloat16:
        pattern = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return pattern.to(tl.float32, bitcast=True)
    elif x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _narrowed(y: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round values to the nearest of a dtype, ties to even."""
    if dtype == tl.bfloat16:
        # By bit patterns, because Triton's interpreter truncates instead of rounding.
        pattern = y.to(tl.uint32, bitcast=True)
        pattern = (pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16
        pattern = tl.where(y == y, pattern, 0x7FC0).to(tl.uint16)
        return pattern.to(tl.bfloat16, bitcast=True)
    else:
        return y.to(dtype)


@triton.jit
def _scale_at(
    offsets: tl.tensor,
    inside: tl.tensor,
    scales: tl.tensor,
    zero_points: tl.tensor,
    row_length: tl.tensor,
    run_length: tl.tensor,
    row_stride: tl.tensor,
    index: tl.constexpr,
) -> tl.tensor:
    """Give the scales and zero points of elements; without zero points, the scales twice.

    A `run_length` of None means one scale for all, a `row_length` of None means one row. Indices
    are computed in the integer type `index`.
    """
    if run_length is None:
        place, inside = 0, None
    elif row_length is None:
        place = (offsets.to(index) // run_length.to(index)).to(tl.int64)
    else:
        row = offsets.to(index) // row_length.to(index)
        column = offsets.to(index) - row * row_length.to(index)
        place = (row * row_stride.to(index) + column // run_length.to(index)).to(tl.int64)
    scale = tl.load(scales + place, mask=inside)
    return scale, scale if zero_points is None else tl.load(zero_points + place, mask=inside)


@triton.jit
def _unscaled(
    x: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, shifted: tl.constexpr
) -> tl.tensor:
    v = x - zero_point if shifted else x
    return v / scale if v.dtype == tl.float64 else tl.div_rn(v, scale)


@triton.jit
def _rescaled(
    q: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, shifted: tl.constexpr
) -> tl.tensor:
    y = q * scale
    return y + zero_point if shifted else y


@triton.jit
def _random_word(
    offsets: tl.tensor,
    inside: tl.tensor,
    words: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    random_bits: tl.tensor,
) -> tl.tensor:
    """Give the random words of elements, by Philox4x32-10 if there is a seed (see philox.py)."""
    if words is not None:
        return tl.load(words + offsets, mask=inside, other=0)
    elif seed_low is not None:
        low = offsets.to(tl.uint32)
        high = (offsets >> 32).to(tl.uint32)
        key_low = seed_low.to(tl.uint32, bitcast=True)
        key_high = seed_high.to(tl.uint32, bitcast=True)
        word, _, _, _ = tl.philox_impl(low, high, low * 0, low * 0, key_low, key_high)
        return word.to(tl.int64) >> (32 - random_bits)
    else:
        return offsets * 0


@triton.jit
def _round(
    v: tl.tensor,
    record: tl.tensor,
    word: tl.tensor,
    random_bits: tl.tensor,
    rounding: tl.constexpr,
    narrow: tl.constexpr,
) -> tl.tensor:
    """Give rounded values and their codes; the code is -1 for NaN."""
    if narrow:
        y, code = _round_narrow(v, record)
    else:
        y, code = _round_wide(v.to(tl.float64), record, word, random_bits, rounding)
    return y.to(v.dtype), code


@triton.jit
def _round_narrow(x: tl.tensor, record: tl.tensor) -> tl.tensor:
    """Round to nearest, ties to even, and saturate to finite values, in float32.

    A number whose last bit is the step is added and subtracted again. The sum is rounded to the
    step, once, and its bit pattern counts the steps.
    """
    low = _float32(record, 0)
    high = _float32(record, 1)
    floor = _integer(record, 2, True)
    raised = _integer(record, 3, True)
    ties_by_parity = _integer(record, 4, True)
    digits = _integer(record, 5, True)
    sign_bit = _integer(record, 6, True)
    zero_sign_bit = _integer(record, 7, True)
    code_sign = _integer(record, 8, True)
    magnitude = tl.where(x < low, low, x)
    magnitude = tl.abs(tl.where(magnitude > high, high, magnitude))
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, floor)
    binade = (exponent - floor) >> 23
    # Without mantissa bits, the parity of the exponent decides ties. In every second binade, the
    # last bit of the anchor is set, which swaps even and odd sums.
    anchor = exponent + raised + (binade & ties_by_parity)
    total = magnitude + anchor.to(tl.float32, bitcast=True)
    y = total - anchor.to(tl.float32, bitcast=True)
    code = total.to(tl.int32, bitcast=True) - anchor + (binade << digits)
    sign = x.to(tl.int32, bitcast=True) & tl.where(y == 0, zero_sign_bit, sign_bit)
    y = (y.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    code = code | tl.where(sign < 0, code_sign, 0)
    return y, tl.where(x != x, -1, code)


@triton.jit
def _round_wide(
    x: tl.tensor,
    record: tl.tensor,
    word: tl.tensor,
    random_bits: tl.tensor,
    rounding: tl.constexpr,
) -> tl.tensor:
    """Round by any policy, in float64 (see plan.py)."""
    limit = _float64(record, 0)
    floor = tl.load(record + 1)
    ceiling = tl.load(record + 2)
    steps_in_binade = _float64(record, 3)
    step_of_one = _float64(record, 4)
    digits = tl.load(record + 5)
    code_base = tl.load(record + 6)
    smallest = _float64(record, 7)
    inverse = _float64(record, 8)
    excess = _float64(record, 9)
    zero_code = tl.load(record + 10)
    nan = x != x
    number = tl.where(nan, 0.0, x)
    negative = number.to(tl.int64, bitcast=True) < 0
    # A step beyond the largest value, no mode rounds back to it.
    magnitude = tl.minimum(tl.abs(number), limit)
    exponent = magnitude.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    exponent = tl.minimum(tl.maximum(exponent, floor), ceiling)
    inverse_binade = ((2046 << 52) - exponent).to(tl.float64, bitcast=True)
    # Exact, or so small that it rounds to 0 without effect: `rest` does not depend on it.
    steps = magnitude * steps_in_binade * inverse_binade
    count = steps.to(tl.int64)
    step = exponent.to(tl.float64, bitcast=True) * step_of_one
    below = magnitude < smallest
    low = tl.where(below, 0.0, count.to(tl.float64) * step)
    gap = tl.where(below, smallest, step)
    code = (((exponent - floor) >> 52) << digits) + count + code_base
    code = tl.where(below, zero_code, code)
    # Below `smallest`, the gap is not always a power of two. `share` is in units of the largest
    # power of two in the gap.
    share = tl.where(below, magnitude * inverse, steps - count.to(tl.float64))
    excess = tl.where(below, excess, 0.0)
    rest = magnitude - low
    if rounding == "StochasticA" or rounding == "StochasticB" or rounding == "StochasticC":
        up = _draws_up(share, excess, word, random_bits, rounding)
    else:
        up = _goes_up(rest, gap, code & 1 == 1, negative, rounding)
    y = tl.where(up, low + gap, low)
    code = tl.where(up, code + 1, code)
    y, code = _saturated(x, y, code, negative, record)
    return tl.where(nan, x, y), tl.where(nan, -1, code)


@triton.jit
def _goes_up(
    rest: tl.tensor,
    gap: tl.tensor,
    odd: tl.tensor,
    negative: tl.tensor,
    rounding: tl.constexpr,
) -> tl.tensor:
    if rounding == "NearestTiesToEven":
        return (rest + rest > gap) | ((rest + rest == gap) & odd)
    elif rounding == "NearestTiesToAway":
        return rest + rest >= gap
    elif rounding == "TowardPositive":
        return (rest > 0) & (negative == 0)
    elif rounding == "TowardNegative":
        return (rest > 0) & negative
    elif rounding == "ToOdd":
        return (rest > 0) & (odd == 0)
    else:
        tl.static_assert(rounding == "TowardZero")
        return rest < 0


@triton.jit
def _draws_up(
    share: tl.tensor,
    excess: tl.tensor,
    word: tl.tensor,
    random_bits: tl.tensor,
    rounding: tl.constexpr,
) -> tl.tensor:
    """Compare with a threshold from the word; policy.py explains it."""
    words = ((random_bits.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    twice = 2 * (words - word.to(tl.float64))
    if rounding != "StochasticA":
        twice = twice - 1
    left = share * (2 * words) - twice
    right = twice * excess
    if rounding == "StochasticC":
        return (left > right) | ((left == right) & (word & 1 == 0))
    else:
        return left >= right


@triton.jit
def _saturated(
    x: tl.tensor,
    magnitude: tl.tensor,
    magnitude_code: tl.tensor,
    negative: tl.tensor,
    record: tl.tensor,
) -> tl.tensor:
    """Give magnitudes their sign, and replace results beyond the range by those of the policy."""
    max_code = tl.load(record + 11)
    negative_max_code = tl.load(record + 12)
    sign_bit = tl.load(record + 13)
    zero_sign_bit = tl.load(record + 14)
    code_sign = tl.load(record + 15)
    sign = tl.where(magnitude_code == 0, zero_sign_bit, sign_bit)
    sign = tl.where(negative, sign, 0)
    y, code = magnitude, magnitude_code
    y, code = _replaced(y, code, magnitude_code < 0, record, 24)
    y, code = _replaced(y, code, magnitude_code > max_code, record, 16)
    y = (y.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    code = code | tl.where(sign < 0, code_sign, 0)
    y, code = _replaced(y, code, negative & (magnitude_code > negative_max_code), record, 18)
    y, code = _replaced(y, code, x == float("inf"), record, 20)
    return _replaced(y, code, x == float("-inf"), record, 22)


@triton.jit
def _replaced(
    y: tl.tensor, code: tl.tensor, mask: tl.tensor, record: tl.tensor, place: tl.constexpr
) -> tl.tensor:
    """Replace values and codes by those of the record."""
    value = _float64(record, place)
    return tl.where(mask, value, y), tl.where(mask, tl.load(record + place + 1), code)


@triton.jit
def _decode(codes: tl.tensor, record: tl.tensor, narrow: tl.constexpr) -> tl.tensor:
    """Give the values of codes in float32 if `narrow`, else in float64."""
    codes = codes.to(tl.int32 if narrow else tl.int64)
    quantum = _float32(record, 3) if narrow else _float64(record, 3)
    magnitude = codes & _integer(record, 0, narrow)
    pattern = (magnitude + _integer(record, 4, narrow)) << _integer(record, 5, narrow)
    linear = magnitude.to(quantum.dtype) * quantum
    is_linear = magnitude < _integer(record, 2, narrow)
    y = tl.where(is_linear, linear, pattern.to(quantum.dtype, bitcast=True))
    infinite = magnitude == _integer(record, 6, narrow)
    nan = (magnitude >= _integer(record, 7, narrow)) | (codes == _integer(record, 8, narrow))
    y = tl.where(infinite, float("inf"), tl.where(nan, float("nan"), y))
    # A product, because not every version of Triton negates zero.
    return y * tl.where((codes & _integer(record, 1, narrow)) != 0, -1.0, 1.0)


@triton.jit
def _store_packed(
    out: tl.tensor,
    codes: tl.tensor,
    size: tl.tensor,
    bits: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write codes of 4 or 6 bits side by side, in groups that fill whole bytes."""
    group: tl.constexpr = 2 if bits == 4 else 4
    shift = (tl.arange(0, block) % group) * bits
    shifted = tl.reshape(codes.to(tl.int32) << shift, (block // group, group))
    together = tl.sum(shifted, axis=1)
    first = _offsets(block // group) * (group * bits // 8)
    for byte in tl.static_range(group * bits // 8):
        value = (together >> (8 * byte)).to(tl.uint8)
        tl.store(out + first + byte, value, mask=first + byte < size)


@triton.jit
def _load_packed(
    packed: tl.tensor, offsets: tl.tensor, inside: tl.tensor, bits: tl.constexpr
) -> tl.tensor:
    first = packed + (offsets * bits >> 3)
    shift = (offsets * bits & 7).to(tl.int32)
    field = tl.load(first, mask=inside, other=0).to(tl.int32)
    if 8 % bits != 0:
        crosses = inside & (shift + bits > 8)
        field = field | tl.load(first + 1, mask=crosses, other=0).to(tl.int32) << 8
    return field >> shift & ((1 << bits) - 1)


@triton.jit
def _integer(record: tl.tensor, place: tl.constexpr, narrow: tl.constexpr) -> tl.tensor:
    number = tl.load(record + place)
    return number.to(tl.int32) if narrow else number


@triton.jit
def _float32(record: tl.tensor, place: tl.constexpr) -> tl.tensor:
    return tl.load(record + place).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _float64(record: tl.tensor, place: tl.constexpr) -> tl.tensor:
    return tl.load(record + place).to(tl.float64, bitcast=True)
