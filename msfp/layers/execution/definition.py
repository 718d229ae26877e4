"""The product of a quantized layer whose grids are whole numbers times a step, to the last bit.

An input is `input_step * n` and a weight of output channel o is `weight_step[o] * m`, with whole
numbers n and m. With S, the exact sum of the products n * m, the output is

    fl(fl(fl(S) * input_step) * weight_step[o]) + bias[o]

in float32, each operation rounded once, to nearest, without fused multiply-add. It is then rounded
to the dtype of the input. Every back end gives these bits, on every device, in any order of sums.

The input of a layer may be split into parts of channels with one scale each. Then S and the two
products are those of each part. The bias is added to the first part, and the next parts are added
one by one.

The input of a linear layer may have a scale for each token (`by_token`). Its step is then
fl(input_step * largest), where `largest` is the largest magnitude of its features (`token_sizes`).
Its zero point is that of the layer times `largest`, rounded likewise.
"""

from __future__ import annotations

import torch

from msfp.layers.execution.grids import DIGITS, IntegerGrids, to_whole, token_sizes
from msfp.layers.execution.protocol import ProductLayer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of inputs that the definition covers."""


def is_defined(layer: ProductLayer, x: torch.Tensor) -> bool:
    """Return whether the definition covers a layer with this input: not under autocast."""
    return (
        x.dtype in DTYPES
        and not torch.is_autocast_enabled(x.device.type)
        and isinstance(layer.integer_grids, IntegerGrids)
    )


def float_product(layer: ProductLayer, x: torch.Tensor, adapter: int) -> torch.Tensor:
    """Return the defined output in float32 operations, which are exact here; with gradients."""
    grids = layer.integer_grids
    if not isinstance(grids, IntegerGrids):
        raise ValueError(grids)
    numbers, weight = layer.input_steps(x), layer.weight_steps(adapter)
    y: torch.Tensor | None = None
    axis = layer.kind.channel_axis(numbers)
    sizes = token_sizes(x) if grids.by_token else 1.0
    for part, (n, m) in enumerate(_pieces(grids, numbers, weight, axis)):
        total = _exact_sums(layer, n, m, grids.digits)
        scaled = total * (layer.input_step(part) * sizes)
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
    if layer.kind.places and m.shape[1] == 1:
        # With one channel, last in memory, convolutions of torch have given wrong numbers.
        n, m = (each.clone(memory_format=torch.contiguous_format) for each in (n, m))
    else:
        n, m = layer.kind.channels_last(n), layer.kind.channels_last(m)
    if n.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # cuDNN may choose algorithms, such as Winograd's, whose steps are no whole numbers.
        with torch.backends.cudnn.flags(enabled=False):
            return _sums_of_digits(layer, n, m, digits)
    return _sums_of_digits(layer, n, m, digits)


def _sums_of_digits(
    layer: ProductLayer, n: torch.Tensor, m: torch.Tensor, digits: int
) -> torch.Tensor:
    """Return the sums of the products with each digit of the weight, put together."""
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
