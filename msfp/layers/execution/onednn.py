"""Products on the INT8 units of x86 processors, by the operators of oneDNN that torch contains."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fpformats import StepEncoder, encode_steps
from msfp.layers.execution.definition import is_defined
from msfp.layers.execution.grids import IntegerGrids, token_sizes
from msfp.layers.execution.inputs import input_grid, is_unwatched, padded
from msfp.layers.execution.operators import (
    Convolution,
    Operands,
    Product,
    checked_product,
    fuses,
)
from msfp.layers.execution.protocol import ProductLayer

SUPPORTED = "supported"
"""Key of the shapes, dtypes and devices of inputs, and whether they are supported."""
TRACED = "traced"
"""Key of the products that torch.compile has traced."""
TRACEABLE = (0, 2)
"""Numbers of spatial dimensions that torch.compile knows the operators of."""
SIGNED_ZERO = 128
"""The byte of zero in signed formats."""
SATURATES = 2**15
"""Processors without VNNI add pairs of products in 16 bits."""
MIN_POSITIONS = 512
"""Number of output positions from which preparing a weight for one product pays."""
MAX_SHAPES = 2
"""Number of shapes of inputs for which an adapter's weight is kept, as oneDNN lays it out."""
_MKLDNN = torch.backends.mkldnn
NARROW = {torch.bfloat16: torch.bfloat16}
"""Dtypes that the operators round to."""


class Part(NamedTuple):
    """The product for some input channels, prepared.

    Attributes:
        encode: Rounds inputs to bytes.
        multiply: The product of bytes and weights.
        channels: Number of input channels.
        padding: Padding with zero that comes before the product, for F.pad, or None.
        token_step: What a byte counts, in units of the largest magnitude of a token; None where
            all tokens have one scale. The product gives the sums then.
    """

    encode: StepEncoder
    multiply: Product
    channels: int
    padding: list[int] | None
    token_step: torch.Tensor | None = None


class OneDNN:
    """Rounds the input to bytes, and multiplies them by weights of 8 bits."""

    def runs(self, grids: IntegerGrids, device: torch.device) -> bool:
        """Return whether the operators give the defined bits on this machine."""
        if device.type != "cpu" or not _MKLDNN.enabled:
            return False
        return fuses(wide=grids.pair >= SATURATES) is not None

    def takes(self, layer: ProductLayer, x: torch.Tensor) -> bool:
        """Return whether the product is defined, and nothing needs to see its operations.

        Such are gradients, transforms and modes of torch. torch.compile traces it.
        """
        if torch.is_grad_enabled() and (x.requires_grad or layer.needs_gradient):
            return False
        if torch.compiler.is_compiling():
            can_trace = layer.keeps and layer.kind.places in TRACEABLE and _has_known_shape(x)
            return can_trace and self._supports(layer, x)
        if not is_unwatched(x) or torch.is_autocast_enabled("cpu") or not _MKLDNN.enabled:
            return False
        found, key = layer.kept().setdefault(SUPPORTED, {}), (x.shape, x.dtype, x.device)
        if key not in found:
            found[key] = self._supports(layer, x)
        supported: bool = found[key]
        return supported

    def _supports(self, layer: ProductLayer, x: torch.Tensor) -> bool:
        """Return whether the operators support a layer for inputs of this shape and dtype."""
        places, grids = layer.kind.places, layer.integer_grids
        return (
            isinstance(grids, IntegerGrids)
            and is_defined(layer, x)
            and self.runs(grids, x.device)
            and x.numel() > 0
            and (x.dim() == places + 2 if places else x.dim() > 0)
            # The operators do not check it, and read beyond their operands.
            and x.shape[layer.kind.channel_axis(x)] == sum(grids.parts)
            and (layer.keeps or _positions(layer, x) >= MIN_POSITIONS)
        )

    def product(self, layer: ProductLayer, x: torch.Tensor, adapter: int) -> torch.Tensor | None:
        """Return the layer's output; None if the input has NaN, which no byte stands for."""
        if layer.kind.places:
            x = padded(layer, x)
        parts = _parts_of(layer, adapter, x.shape)
        if not parts:
            return None
        bias = layer.bias
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.float()
        if torch.compiler.is_compiling():
            return _traced_product(layer, x, parts, bias)
        if len(parts) > 1:
            return _sum_of_parts(layer, x, parts, bias)
        y = _part_of_product(layer, x, parts[0], bias, NARROW.get(x.dtype, torch.float32))
        return y if y is None or y.dtype == x.dtype else y.to(x.dtype)


def _sum_of_parts(
    layer: ProductLayer, x: torch.Tensor, parts: list[Part], bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the product with several parts; None if the input has NaN."""
    sizes, axis = [each.channels for each in parts], layer.kind.channel_axis(x)
    total: torch.Tensor | None = None
    for channels, part in zip(x.split(sizes, axis), parts, strict=True):
        copy, added = layer.kind.channels_last(channels), bias if total is None else None
        y = _part_of_product(layer, copy, part, added, torch.float32)
        if y is None:
            return None
        total = y if total is None else total.add_(y)
    return None if total is None else total.to(x.dtype)


def _part_of_product(
    layer: ProductLayer,
    x: torch.Tensor,
    part: Part,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """Return the product for some input channels; None if they have NaN."""
    try:
        if part.token_step is not None:
            return _product_by_token(layer, x, part, part.token_step, bias).to(dtype)
        numbers: torch.Tensor = part.encode(x)
    except ValueError:
        return None
    if x.dim() != 2 and not layer.kind.places:
        y = part.multiply(numbers.reshape(-1, x.shape[-1]), bias, dtype)
        return y.view(*x.shape[:-1], -1)
    if part.padding is not None:
        numbers = F.pad(numbers, part.padding, value=part.multiply.zero)
    return part.multiply(numbers, bias, dtype)


def _product_by_token(
    layer: ProductLayer,
    x: torch.Tensor,
    part: Part,
    step: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return the product, in float32, where each token has a scale.

    Raises:
        ValueError: If the input has NaN (not checked under torch.compile).
    """
    encode, sizes = part.encode, token_sizes(x)
    zero = None if encode.zero_point is None else sizes * encode.zero_point
    numbers = encode_steps(x, encode.format, sizes * encode.scale, zero)
    sums = part.multiply(numbers.reshape(-1, x.shape[-1]), None, torch.float32)
    y, steps = sums.view(*x.shape[:-1], -1), (sizes * step, layer.weight_step.detach())
    if torch.compiler.is_compiling():  # fuses them, without writing to operands
        y = y * steps[0] * steps[1]
        return y if bias is None else y + bias
    y = y.mul_(steps[0]).mul_(steps[1])
    return y if bias is None else y.add_(bias)


def _traced_product(
    layer: ProductLayer, x: torch.Tensor, parts: list[Part], bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the product in operations that torch.compile sees and fuses with their neighbours.

    NaN anywhere in the input makes all outputs NaN.
    """
    step = parts[0].token_step
    if step is not None:
        y = _product_by_token(layer, x, parts[0], step, bias)
        return torch.where(x.isnan().any(), torch.nan, y).to(x.dtype)
    sizes, axis = [each.channels for each in parts], layer.kind.channel_axis(x)
    total: torch.Tensor | None = None
    for channels, part in zip(x.split(sizes, axis), parts, strict=True):
        encode = part.encode
        numbers = encode_steps(channels, encode.format, encode.scale, encode.zero_point)
        if part.padding is not None:
            numbers = F.pad(numbers, part.padding, value=part.multiply.zero)
        if not layer.kind.places:
            numbers = numbers.reshape(-1, numbers.shape[-1])
        y = part.multiply(numbers, bias if total is None else None, torch.float32)
        total = y if total is None else total + y
    if total is None:
        raise ValueError("a layer has at least one part")
    if not layer.kind.places:
        total = total.view(*x.shape[:-1], -1)
    return torch.where(x.isnan().any(), torch.nan, total).to(x.dtype)


def _has_known_shape(x: torch.Tensor) -> bool:
    """Return whether torch.compile traces an input of one shape, to run it here."""
    return not torch.compiler.is_exporting() and all(type(size) is int for size in x.shape)


def _traced_parts(layer: Any, adapter: int, shape: tuple[int, ...]) -> list[Part]:
    """Return the parts of a packed layer's product, where torch.compile traces it."""
    _prepare_once(layer, adapter, shape)
    parts: list[Part] = layer._kept[TRACED][adapter, shape]
    return parts


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare_once(layer: ProductLayer, adapter: int, shape: tuple[int, ...]) -> bool:
    """Prepare the product for inputs of a shape, when torch.compile traces it."""
    found = layer.kept().setdefault(TRACED, {})
    if (adapter, shape) not in found:
        found[adapter, shape] = prepare(layer, adapter, shape, traced=True)
    return True


def _parts_of(layer: ProductLayer, adapter: int, shape: torch.Size) -> list[Part]:
    """Return the parts of a layer's product for inputs of a shape, kept if the layer keeps them."""
    if not layer.keeps:
        return prepare(layer, adapter, shape)
    if torch.compiler.is_compiling():
        return _traced_parts(layer, adapter, tuple(shape))
    kept = layer.kept().setdefault(OneDNN, {})
    found: list[Part] | None = kept.get((adapter, shape))
    if found is None:
        others = [key for key in kept if key[0] == adapter]
        if len(others) >= MAX_SHAPES:
            del kept[others[0]]
        found = kept[adapter, shape] = prepare(layer, adapter, shape)
    return found


@torch.no_grad()
def prepare(
    layer: ProductLayer, adapter: int, shape: tuple[int, ...], *, traced: bool = False
) -> list[Part]:
    """Return the parts of a layer's product for inputs of a shape, to be traced or not.

    There are none if the operators do not give the defined bits for this shape.
    """
    grids = layer.integer_grids
    if not isinstance(grids, IntegerGrids):
        raise ValueError(grids)
    weights = layer.weight_steps(adapter).to(torch.int8)
    convolution, explicit = _convolution(layer), _explicit_padding(layer)
    if convolution is None:
        # torch.compile fuses what follows a small product, and refuses the operator for large ones.
        shape = (0 if traced else math.prod(shape[:-1]), shape[-1])
    elif explicit is not None:
        ends = zip(explicit[::2], explicit[1::2], strict=True)
        longer = [
            length + sum(pair) for length, pair in zip(reversed(shape[2:]), ends, strict=True)
        ]
        shape = (*shape[:2], *reversed(longer))
    pieces = (weights,) if len(grids.parts) == 1 else weights.split(grids.parts, 1)
    parts = []
    for part, (piece, channels) in enumerate(zip(pieces, grids.parts, strict=True)):
        grid, offset = input_grid(layer, grids, part), SIGNED_ZERO if grids.input.signed else 0
        encode = StepEncoder(grids.input, grid.scale, grid.shift)
        step, zero = layer.weight_step.detach(), grid.zero + offset
        scales = (torch.ones_like(step), 1.0) if grids.by_token else (step, grid.step.item())
        multiply = checked_product(
            Operands(piece, *scales, zero),
            (shape[0], channels, *shape[2:]),
            convolution,
            largest=grids.input.max_steps + offset,
            wide=grids.pair >= SATURATES,
        )
        if multiply is None:
            return []
        token_step = grid.step if grids.by_token else None
        parts.append(Part(encode, multiply, channels, explicit, token_step))
    return parts


def _convolution(layer: ProductLayer) -> Convolution | None:
    """Return how a layer moves if it is a convolution; without padding that is added before."""
    if not layer.kind.places:
        return None
    plain = layer.plain
    padding = tuple(plain._reversed_padding_repeated_twice[::-2])
    if plain.padding_mode != "zeros" or _explicit_padding(layer) is not None:
        padding = (0,) * layer.kind.places
    return Convolution(plain.stride, padding, plain.dilation, plain.groups)


def _explicit_padding(layer: ProductLayer) -> list[int] | None:
    """Return the padding of bytes before a convolution, for F.pad; None if it pads itself.

    Its operator pads all ends of an axis alike. With groups, or where a kernel lies in the padding
    as a whole, it has read beyond the memory of its operands.
    """
    plain = layer.plain
    if not layer.kind.places or plain.padding_mode != "zeros":
        return None
    amounts: list[int] = plain._reversed_padding_repeated_twice
    reach = [d * (k - 1) for d, k in zip(plain.dilation, plain.kernel_size, strict=True)]
    beyond = any(amount > most for amount, most in zip(amounts[::2], reversed(reach), strict=True))
    alike = amounts[::2] == amounts[1::2]
    if not any(amounts) or (alike and plain.groups == 1 and not beyond):
        return None
    return amounts


def _positions(layer: ProductLayer, x: torch.Tensor) -> int:
    """Return about how many outputs each weight takes part in."""
    return x.numel() // x.shape[layer.kind.channel_axis(x)]
