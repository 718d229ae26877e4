"""The product of a quantized layer whose grids are whole numbers times a step, to the last bit.

An input is `input_step * n` and a weight of output channel o is `weight_step[o] * m`, with whole
numbers n and m. With S, the exact sum of the products n * m, the output is

    fl(fl(fl(S) * input_step) * weight_step[o]) + bias[o]

in float32, each operation rounded once, to nearest, without fused multiply-add. It is then rounded
to the dtype of the input. Every back end gives these bits, on every device, in any order of sums.

The input of a layer may be split into parts of channels with one scale each. Then S and the two
products are those of each part. The bias is added to the first part, and the next parts are added
one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fpformats import FloatFormat

if TYPE_CHECKING:
    from msfp.layers.execution.protocol import ProductLayer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of inputs that the definition covers."""
EXACT = 2**24
"""Float32 sums of whole numbers are exact below this bound, in any order."""
MAX_SUM = 2**31
"""Sums must be below this bound, so that they fit an int32."""
MAX_BYTE, MAX_SIGNED = 255, 127
MAX_PARTS = 4
DIGITS = {1: 0, 2: 16, 4: 4}
"""Numbers of digits of a weight in float32 products, and their base."""


def fits_byte(fmt: FloatFormat) -> bool:
    """Return whether all values of a format, in steps, fit a byte.

    Example:
        >>> from fpformats import E2M1, E3M2
        >>> fits_byte(E2M1), fits_byte(E3M2)
        (True, False)
    """
    return fmt.max_steps <= (MAX_SIGNED if fmt.signed else MAX_BYTE)


@dataclass(frozen=True)
class IntegerGrids:
    """The grids of a layer's operands as whole numbers times steps.

    Attributes:
        weight: Format of the weights.
        input: Format of the inputs.
        parts: Number of input channels with one scale, in their order; the sum is that of all.
        terms: Largest number of products in a sum.
        digits: Digits of a weight in float32 products, so that all sums are exact.
        pair: Largest sum of two products of a byte and a weight.
    """

    weight: FloatFormat
    input: FloatFormat
    parts: tuple[int, ...]
    terms: int
    digits: int
    pair: int


def integer_grids(
    weight: FloatFormat,
    inputs: FloatFormat | None,
    scale: torch.Tensor | None,
    *,
    whole: bool,
    terms: int,
    channels: int,
    groups: int = 1,
) -> IntegerGrids | str:
    """Return the grids of a layer as whole numbers, or the reason why its product has no such form.

    Args:
        weight: Format of the weights.
        inputs: Format of the inputs, or None if they are not quantized.
        scale: Input scale, one number, or one for each channel.
        whole: Whether the zero point of the inputs is a whole number of steps, or there is none.
        terms: Number of products in one output.
        channels: Number of input channels.
        groups: Number of groups of a convolution.
    """
    if inputs is None or scale is None:
        return "its inputs are not quantized"
    for fmt in (weight, inputs):
        if not fits_byte(fmt):
            return f"{fmt} has up to {fmt.max_steps} steps, which is more than a byte"
    if not whole:
        return "its zero point is not a whole number of steps"
    parts = (channels,)
    if scale.dim():
        parts = tuple(scale.flatten().unique_consecutive(return_counts=True)[1].tolist())
        if len(parts) > MAX_PARTS or (groups > 1 and len(parts) > 1):
            return f"its inputs have {len(parts)} scales"
    terms = terms * max(parts) // channels
    digits = _digits(terms * inputs.max_steps, weight)
    byte = inputs.max_steps + (128 if inputs.signed else 0)
    if digits is None or terms * MAX_BYTE * weight.max_steps >= MAX_SUM:
        return f"its sums have {terms} products, which may be too much for an int32"
    return IntegerGrids(weight, inputs, parts, terms, digits, 2 * byte * weight.max_steps)


def _digits(sum_of_inputs: int, weight: FloatFormat) -> int | None:
    """Return in how many digits weights must be multiplied, so that float32 sums are exact."""
    for count, base in DIGITS.items():
        most = weight.max_steps if count == 1 else base // 2
        if sum_of_inputs * most < EXACT:
            return count
    return None


def whole_steps(
    fmt: FloatFormat, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor | None:
    """Return a zero point in steps, with its sign changed: the number that stands for zero.

    Args:
        fmt: Unsigned format.
        scale: Float32, one number or one for each channel.
        zero_point: Float32, one number.

    Returns:
        Float32 of the shape of `scale`; None if it is not a whole number that the format reaches.

    Example:
        >>> from fpformats import E2M2U
        >>> whole_steps(E2M2U, torch.tensor(0.5), torch.tensor(-0.375))
        tensor(3.)
    """
    step = scale.detach() * fmt.step
    steps = (-zero_point.detach() / step).round()
    is_whole = (-steps * step == zero_point) & (steps >= 0) & (steps <= fmt.max_steps)
    return steps if bool(is_whole.all()) else None


def is_defined(layer: ProductLayer, x: torch.Tensor) -> bool:
    """Return whether the definition covers a layer with this input: not under autocast."""
    return (
        x.dtype in DTYPES
        and not torch.is_autocast_enabled(x.device.type)
        and isinstance(layer.integer_grids, IntegerGrids)
    )


class _Round(torch.autograd.Function):
    """Rounding to whole numbers, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        del ctx
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        del ctx
        return grad


def to_whole(x: torch.Tensor) -> torch.Tensor:
    """Return numbers that are nearly whole as whole numbers, with the gradient of the identity."""
    if not x.requires_grad:
        return x.round()
    rounded: torch.Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def float_product(layer: ProductLayer, x: torch.Tensor, adapter: int) -> torch.Tensor:
    """Return the defined output in float32 operations, which are exact here; with gradients."""
    grids = layer.integer_grids
    if not isinstance(grids, IntegerGrids):
        raise ValueError(grids)
    numbers, weight = layer.input_steps(x), layer.weight_steps(adapter)
    y: torch.Tensor | None = None
    axis = layer.kind.channel_axis(numbers)
    for part, (n, m) in enumerate(_pieces(grids, numbers, weight, axis)):
        total = _exact_sums(layer, n, m, grids.digits)
        scaled = total * layer.input_step(part)
        scaled = scaled * _by_row(layer, layer.weight_step, scaled)
        if y is None:
            y = scaled if layer.bias is None else scaled + _by_row(layer, layer.bias, scaled)
        else:
            y = y + scaled
    assert y is not None  # noqa: S101 - there is a part
    return layer.kind.channels_last(y.to(x.dtype))


def _pieces(
    grids: IntegerGrids, numbers: torch.Tensor, weight: torch.Tensor, axis: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return inputs and weights of each part; a layer with groups has one part."""
    if len(grids.parts) == 1:
        return [(numbers, weight)]
    return list(zip(numbers.split(grids.parts, axis), weight.split(grids.parts, 1), strict=True))


def _by_row(layer: ProductLayer, numbers: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return one number for each output channel, in float32 and in a shape that broadcasts."""
    return numbers.float().view(-1, *(1,) * (y.dim() - 1 - layer.kind.channel_axis(y)))


def _exact_sums(layer: ProductLayer, n: torch.Tensor, m: torch.Tensor, digits: int) -> torch.Tensor:
    """Return the exact sums, rounded to float32."""
    n, m = layer.kind.channels_last(n), layer.kind.channels_last(m)
    if digits == 1:
        return layer.compute(n, m, None)
    base, power, products = DIGITS[digits], 1, []
    for _ in range(digits - 1):
        upper = to_whole(m / base)
        lower = (m - base * upper).detach()  # the gradient passes through the upper digits
        products.append(power * layer.compute(n, lower, None))
        power, m = power * base, upper
    products.append(power * layer.compute(n, m, None))
    if digits == 2:
        return products[0] + products[1]  # two exact numbers, and one rounding
    return sum((each.double() for each in products[1:]), products[0].double()).float()
