"""The grids of a layer's operands as whole numbers times steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fpformats import FloatFormat

SMALLEST, LARGEST = 2.0**-100, 2.0**120
"""Ends of what the largest magnitude of a token is taken as, so that its scale is a number."""
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
        by_token: Whether scale and zero point of the input are in units of the largest magnitude of
            each token.
    """

    weight: FloatFormat
    input: FloatFormat
    parts: tuple[int, ...]
    terms: int
    digits: int
    pair: int
    by_token: bool = False


def integer_grids(
    weight: FloatFormat,
    inputs: FloatFormat | None,
    scale: torch.Tensor | None,
    *,
    whole: bool,
    terms: int,
    channels: int,
    groups: int = 1,
    by_token: bool = False,
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
        by_token: Whether the scale is in units of the largest magnitude of each token.
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
    pair = 2 * byte * weight.max_steps
    return IntegerGrids(weight, inputs, parts, terms, digits, pair, by_token)


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


def token_sizes(x: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each token, float32, shape (..., 1), without a gradient.

    It is at least 2^-100 and at most 2^120. A token with NaN has 1, so that its other numbers stay
    numbers.

    Args:
        x: Features on the last axis.

    Example:
        >>> token_sizes(torch.tensor([[1.0, -3.0], [0.0, 0.0]])).tolist() == [[3.0], [2.0**-100]]
        True
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True).float()
    return largest.clamp(SMALLEST, LARGEST).nan_to_num(1.0)


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
