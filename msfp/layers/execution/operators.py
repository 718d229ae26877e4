"""The INT8 operators of oneDNN in torch, and the check that they give the defined bits here."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

LARGEST = {False: (191, 64), True: (255, 127)}
"""Largest byte and weight of the formats whose pairs of products fit 16 bits, and of all."""


class Convolution(NamedTuple):
    """How a convolution moves; all but the groups by spatial axis, as many as it has."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Weight(NamedTuple):
    """A weight of whole numbers, laid out by oneDNN.

    Attributes:
        packed: The weight, as oneDNN alone reads it.
        step: What they count: one float32 number for each output channel.
        zero: Zeros, int32, for each output channel.
        convolution: How it moves, or None for a linear layer.
        channels: Number of input channels.
    """

    packed: torch.Tensor
    step: torch.Tensor
    zero: torch.Tensor
    convolution: Convolution | None
    channels: int


def prepack(
    weight: torch.Tensor,
    step: torch.Tensor,
    input_step: float,
    input_zero: int,
    convolution: Convolution | None,
) -> Weight:
    """Lay out an int8 weight, output channels first, for `multiply`."""
    zero = torch.zeros(len(weight), dtype=torch.int32)
    operators = torch.ops.onednn
    if convolution is None:
        packed = operators.qlinear_prepack(weight.contiguous(), None)
        return Weight(packed, step, zero, None, weight.shape[1])
    stride, padding, dilation, groups = convolution
    packed = operators.qconv_prepack(
        *(weight, step, input_step, input_zero),
        *(list(stride), list(padding), list(dilation), groups, None),
    )
    return Weight(packed, step, zero, convolution, weight.shape[1] * groups)


def multiply(
    x: torch.Tensor,
    step: float,
    zero: int,
    weight: Weight,
    bias: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the defined product of bytes and a weight.

    Args:
        x: Bytes, uint8: (rows, features), or (batch, channels, ...) for a convolution.
        step: What a byte counts.
        zero: The byte of zero, with which convolutions pad.
        weight: The weight.
        bias: Float32, or None.
        dtype: Float32 or bfloat16, to which the result is rounded.
    """
    packed, w_step, w_zero, convolution, _ = weight
    scaling: tuple[Any, ...] = (1.0, 0, dtype, "none", [], "")
    if convolution is None:
        linear = torch.ops.onednn.qlinear_pointwise.default
        result: torch.Tensor = linear(x, step, zero, packed, w_step, w_zero, bias, *scaling)
        return result
    stride, padding, dilation, groups = convolution
    convolve = getattr(torch.ops.onednn, f"qconv{len(stride)}d_pointwise").default
    moves = (list(stride), list(padding), list(dilation), groups)
    result = convolve(x, step, zero, packed, w_step, w_zero, bias, *moves, *scaling)
    # As other convolutions of torch do: channels are last in memory for images and volumes alone.
    return result.contiguous() if len(stride) == 1 else result


@functools.cache
def agrees(*, wide: bool) -> bool:
    """Return whether the operators give the defined bits on this machine, and warn if not.

    Args:
        wide: Whether to check with all bytes, or with those whose pairs of products fit 16 bits.
    """
    try:
        same = all(_agrees(wide, convolution) for convolution in _EXAMPLES)
        why = "other bits than defined"
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        same, why = False, str(error).splitlines()[0]
    if not same and not wide:
        warnings.warn(
            f"quantized layers are computed in floating point: the integer operators of torch "
            f"{torch.__version__} fail here ({why})",
            stacklevel=2,
        )
    return same


_EXAMPLES = (
    None,
    Convolution((1,), (1,), (1,), 1),
    Convolution((1, 1), (1, 1), (1, 1), 1),
    Convolution((2, 1), (0, 2), (1, 2), 2),
    Convolution((1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
)


def _agrees(wide: bool, convolution: Convolution | None) -> bool:
    """Compare the operators with the definition for one kind of layer."""
    generator = torch.Generator().manual_seed(0)
    byte, most = LARGEST[wide]
    places = 0 if convolution is None else len(convolution.stride)
    groups = 1 if convolution is None else convolution.groups
    shape = (48, 64 // groups, *(3,) * places)
    weight = torch.randint(-most, most + 1, shape, generator=generator).to(torch.int8)
    weight[0], weight[1], weight[2] = most, -most, most
    step = torch.rand(48, generator=generator) / 100 + 1e-3
    bias = torch.randn(48, generator=generator)
    x = torch.randint(0, byte + 1, (3, 64, *(6,) * places), generator=generator).to(torch.uint8)
    x[0] = byte
    for zero, given in ((0, None), (0, bias), (3, bias), (128, None)):
        laid_out = prepack(weight, step, 0.3, zero, convolution)
        for dtype in (torch.float32, torch.bfloat16):
            found = multiply(x, 0.3, zero, laid_out, given, dtype)
            wanted = _defined(x, zero, weight, step, given, convolution).to(dtype)
            if not torch.equal(found, wanted):
                return False
    return True


def _defined(
    x: torch.Tensor,
    zero: int,
    weight: torch.Tensor,
    step: torch.Tensor,
    bias: torch.Tensor | None,
    convolution: Convolution | None,
) -> torch.Tensor:
    """Return the product by its definition, with sums in float64, which are exact."""
    n, m = x.double() - zero, weight.double()
    if convolution is None:
        places, sums = 0, F.linear(n, m)
    else:
        places = len(convolution.stride)
        sums = (F.conv1d, F.conv2d, F.conv3d)[places - 1](n, m, None, *convolution)
    row = (-1, *(1,) * places)
    scaled = sums.float() * torch.tensor(0.3) * step.view(row)
    return scaled if bias is None else scaled + bias.view(row)
