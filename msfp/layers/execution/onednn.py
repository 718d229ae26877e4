"""Products on the INT8 units of x86 processors, by the operators of oneDNN that torch contains."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fpformats import StepEncoder
from msfp.layers.execution.definition import IntegerGrids, is_defined, whole_steps
from msfp.layers.execution.operators import Convolution, Weight, agrees, multiply, prepack
from msfp.layers.execution.protocol import ProductLayer

SATURATES = 2**15
"""Processors without VNNI add pairs of products in 16 bits."""
MIN_POSITIONS = 512
"""Number of output positions from which preparing a weight for one product pays."""
TYPES = (torch.Tensor, nn.Parameter)


class Operands(NamedTuple):
    """The operands of one part of a layer: some input channels, and their weights.

    Attributes:
        encode: Rounds inputs to bytes.
        step: What a byte counts: the input's scale times the step of its format.
        zero: The byte of zero.
        weight: The weights.
    """

    encode: StepEncoder
    step: float
    zero: int
    weight: Weight


class OneDNN:
    """Rounds the input to bytes, and multiplies them by weights of 8 bits."""

    def runs(self, grids: IntegerGrids, device: torch.device) -> bool:
        """Return whether the operators give the defined bits on this machine."""
        if device.type != "cpu" or not torch.backends.mkldnn.enabled:
            return False
        return agrees(wide=grids.pair >= SATURATES)

    def takes(self, layer: ProductLayer, x: torch.Tensor) -> bool:
        """Return whether the product is defined, and nothing needs to see its operations.

        Such are gradients, compilers, transforms and modes of torch.
        """
        if torch.compiler.is_compiling() or not is_defined(layer, x) or not _is_unwatched(x):
            return False
        grids = layer.integer_grids
        places = layer.kind.places
        return (
            isinstance(grids, IntegerGrids)
            and x.numel() > 0
            and x.dim() == (places + 2 if places else x.dim())
            and not (torch.is_grad_enabled() and (x.requires_grad or layer.needs_gradient))
            and self.runs(grids, x.device)
            and (layer.keeps or _positions(layer, x) >= MIN_POSITIONS)
        )

    def product(self, layer: ProductLayer, x: torch.Tensor, adapter: int) -> torch.Tensor | None:
        """Return the layer's output; None if the input has NaN, which no byte stands for."""
        operands = _operands_of(layer, adapter)
        bias = None if layer.bias is None else layer.bias.detach().float()
        x = _padded(layer, x)
        if len(operands) == 1:
            dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
            y = _part_of_product(layer, x, operands[0], bias, dtype)
            return y if y is None or y.dtype == x.dtype else y.to(x.dtype)
        axis = layer.kind.channel_axis(x)
        total: torch.Tensor | None = None
        sizes = [each.weight.channels for each in operands]
        for part, operand in zip(x.split(sizes, axis), operands, strict=True):
            copy = layer.kind.channels_last(part)
            y = _part_of_product(layer, copy, operand, bias if total is None else None)
            if y is None:
                return None
            total = y if total is None else total.add_(y)
        return None if total is None else total.to(x.dtype)


def _part_of_product(
    layer: ProductLayer,
    x: torch.Tensor,
    operands: Operands,
    bias: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor | None:
    """Return the product for some input channels; None if they have NaN."""
    try:
        numbers: torch.Tensor = operands.encode(x)
    except ValueError:
        return None
    _, step, zero, weight = operands
    if weight.convolution is None:
        rows = numbers.reshape(-1, numbers.shape[-1])
        y = multiply(rows, step, zero, weight, bias, dtype)
        return y.view(*x.shape[:-1], -1)
    uneven = _uneven_padding(layer)
    if uneven is not None:
        numbers = F.pad(numbers, uneven, value=zero)
    return multiply(numbers, step, zero, weight, bias, dtype)


def _operands_of(layer: ProductLayer, adapter: int) -> list[Operands]:
    """Return the operands of the parts of a layer, kept if the layer keeps them."""
    if not layer.keeps:
        return prepare(layer, adapter)
    kept, key = layer.kept(), ("onednn", adapter)
    if key not in kept:
        kept[key] = prepare(layer, adapter)
    operands: list[Operands] = kept[key]
    return operands


@torch.no_grad()
def prepare(layer: ProductLayer, adapter: int) -> list[Operands]:
    """Return the operands of the parts of a layer."""
    grids = layer.integer_grids
    if not isinstance(grids, IntegerGrids):
        raise ValueError(grids)
    weights = layer.weight_steps(adapter).to(torch.int8)
    steps, shift, convolution = layer.weight_step.detach(), layer.input_shift, _convolution(layer)
    operands = []
    pieces = (weights,) if len(grids.parts) == 1 else weights.split(grids.parts, 1)
    for part, piece in enumerate(pieces):
        step = layer.input_step(part).detach()
        scale = step / grids.input.step  # exact: the format's step is a power of two
        zero = 128 if grids.input.signed else 0
        if shift is not None:
            found = whole_steps(grids.input, scale, shift)
            zero = 0 if found is None else int(found)
        encode = StepEncoder(grids.input, scale.item(), None if shift is None else shift.item())
        weight = prepack(piece, steps, step.item(), zero, convolution)
        operands.append(Operands(encode, step.item(), zero, weight))
    return operands


def _padded(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return an input with the padding of a layer that does not pad with zeros."""
    if not layer.kind.places or layer.padding_mode == "zeros":
        return x
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)


def _convolution(layer: Any) -> Convolution | None:
    """Return how a layer moves if it is a convolution; without padding that is added before."""
    if not layer.kind.places:
        return None
    padding = tuple(layer._reversed_padding_repeated_twice[::-2])
    if layer.padding_mode != "zeros" or _uneven_padding(layer) is not None:
        padding = (0,) * layer.kind.places
    return Convolution(layer.stride, padding, layer.dilation, layer.groups)


def _uneven_padding(layer: Any) -> list[int] | None:
    """Return padding with zero that differs between the two ends of an axis, for F.pad."""
    amounts: list[int] = layer._reversed_padding_repeated_twice
    if layer.padding_mode != "zeros" or amounts[::2] == amounts[1::2]:
        return None
    return amounts


def _positions(layer: ProductLayer, x: torch.Tensor) -> int:
    """Return about how many outputs each weight takes part in."""
    return x.numel() // x.shape[layer.kind.channel_axis(x)]


def _is_unwatched(x: torch.Tensor) -> bool:
    """Return whether a tensor is plain, and nothing intercepts operations on it."""
    internals = torch._C
    return (
        type(x) in TYPES
        and x.layout is torch.strided
        and not internals._len_torch_dispatch_stack()
        and not internals._len_torch_function_stack()
        and internals._get_tracing_state() is None
        and not internals._functorch.is_functorch_wrapped_tensor(x)
    )
