"""Kinds of layers that can be quantized: the computation of a plain layer, for any parameters.

To add a kind, add an entry to `KINDS` and its quantized classes to `families`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from msfp.errors import InputError

PlainLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""The plain layers of all kinds."""


class LayerKind(ABC):
    """The computation of the layers of one class.

    Attributes:
        places: Number of spatial dimensions that a kernel moves along, 0 without a kernel.
    """

    places: int = 0

    @abstractmethod
    def compute(
        self, layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply a layer with other parameters; zero padding is exactly zero."""

    @abstractmethod
    def mix(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Apply a matrix (rows, columns) to the channels, or features, at each position."""

    def add_mixed(self, y: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Return `y + mix(x, matrix)`, each number rounded once; y is overwritten if possible.

        It is not overwritten if gradients are recorded.
        """
        if self.places:
            axis = self.channel_axis(y)
            x, y = x.movedim(axis, -1), y.movedim(axis, -1)
        flat, terms = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not y.is_contiguous():
            y = torch.addmm(flat, terms, matrix.t()).view(y.shape)
        else:
            flat.addmm_(terms, matrix.t())
        if self.places:
            y = y.movedim(-1, axis)
        return y.contiguous() if self.places == 1 else y

    @abstractmethod
    def channel_axis(self, x: torch.Tensor) -> int:
        """Return the channel, or feature, axis of an input or output."""

    def channels_last(self, x: torch.Tensor) -> torch.Tensor:
        """Return an input or weight with the channels last in memory, if that is the faster."""
        return x

    @abstractmethod
    def columns(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the operand of the layer's weight matrix, shape (groups, columns, positions)."""

    @abstractmethod
    def rows(self, layer: Any, y: torch.Tensor) -> torch.Tensor:
        """Return an output in the shape of matrix times columns, (groups, rows, positions)."""


class LinearKind(LayerKind):
    """Linear layers, with features on the last axis."""

    def compute(
        self, layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply a layer with other parameters."""
        del layer
        return F.linear(x, weight, bias)

    def mix(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Apply a matrix to the features at each position."""
        return F.linear(x, matrix)

    def channel_axis(self, x: torch.Tensor) -> int:
        """Return the last axis."""
        return x.dim() - 1

    def columns(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the features of each token, shape (1, features, tokens)."""
        del layer
        return x.reshape(1, -1, x.shape[-1]).mT

    def rows(self, layer: Any, y: torch.Tensor) -> torch.Tensor:
        """Return the features of each token, shape (1, features, tokens)."""
        del layer
        return y.reshape(1, -1, y.shape[-1]).mT


class ConvKind(LayerKind):
    """Convolutions over one to three dimensions, with any stride, dilation, groups and padding.

    Args:
        places: Number of dimensions that the kernel moves along.
    """

    def __init__(self, places: int) -> None:
        self.places = places

    def compute(
        self, layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply a layer with other parameters; zero padding is exactly zero."""
        y: torch.Tensor = layer._conv_forward(x, weight, bias)
        return y

    def channels_last(self, x: torch.Tensor) -> torch.Tensor:
        """Return a batch of images or volumes with the channels last in memory."""
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if last is None or x.dim() != self.places + 2:
            return x
        x = x.contiguous(memory_format=last)
        # Axes of length 1 may have any stride, from which torch may choose another algorithm.
        order = (0, *range(2, x.dim()), 1)
        strides = [0] * x.dim()
        stride = 1
        for axis in reversed(order):
            strides[axis], stride = stride, stride * max(x.shape[axis], 1)
        return x if x.stride() == tuple(strides) else x.as_strided(x.shape, strides)

    def mix(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Apply a matrix to the channels at each position, as a convolution with kernel size 1."""
        mix = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self.places]
        return mix(x, matrix.view(*matrix.shape, *(1,) * self.places))

    def channel_axis(self, x: torch.Tensor) -> int:
        """Return the axis before the spatial axes; an input may have no batch axis."""
        return x.dim() - self.places - 1

    def columns(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the unfolded patches under the kernel, in the order of `weight.flatten(1)`."""
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded: torch.Tensor = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
        if self.places == 3:
            return _by_group(_unfolded(padded, kernel, dilation, stride), layer.groups)
        if self.places == 1:  # unfold supports only images, so the height becomes 1
            padded = padded.unsqueeze(2)
            kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
        return _by_group(F.unfold(padded, kernel, dilation, stride=stride), layer.groups)

    def rows(self, layer: Any, y: torch.Tensor) -> torch.Tensor:
        """Return the channels at each position, by group."""
        return _by_group(y.flatten(2), layer.groups)


def _unfolded(
    x: torch.Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """Return patches (batch, channels * kernel, positions), as F.unfold, of any dimensions."""
    places = len(kernel)
    for place in range(places):
        x = x.unfold(2 + place, dilation[place] * (kernel[place] - 1) + 1, stride[place])
        x = x[..., :: dilation[place]]
    order = (0, 1, *range(2 + places, 2 + 2 * places), *range(2, 2 + places))
    return x.permute(order).flatten(1, 1 + places).flatten(2)


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Reshape (batch, channels, positions) to (groups, channels / groups, batch * positions)."""
    split: torch.Tensor = x.unflatten(1, (groups, -1))
    return split.permute(1, 2, 0, 3).flatten(2)


KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LinearKind(),
    nn.Conv1d: ConvKind(1),
    nn.Conv2d: ConvKind(2),
    nn.Conv3d: ConvKind(3),
}
"""The kind of each plain class."""


def plain_class(layer: type[nn.Module]) -> type[nn.Module]:
    """Return the plain class that a class of layers is or derives from.

    Raises:
        InputError: If there is no such class, as for a transposed convolution.

    Example:
        >>> plain_class(nn.ConvTranspose1d)
        Traceback (most recent call last):
        msfp.errors.InputError: ConvTranspose1d cannot be quantized: it is none of Linear, Conv1d,
        Conv2d, Conv3d
    """
    found = next((plain for plain in KINDS if issubclass(layer, plain)), None)
    if found is None:
        names = ", ".join(plain.__name__ for plain in KINDS)
        raise InputError(f"{layer.__name__} cannot be quantized: it is none of {names}")
    return found


def kind_of(layer: nn.Module) -> LayerKind:
    """Return the kind of a layer, plain or quantized.

    Raises:
        InputError: If layers of this class cannot be quantized.
    """
    return KINDS[plain_class(type(layer))]


def groups_of(layer: nn.Module) -> int:
    """Return the number of groups of a convolution; 1 for a linear layer."""
    groups: int = getattr(layer, "groups", 1)
    return groups


def kernel_shape(layer: nn.Module, matrix: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a matrix row in the layer's weight: input channels, then kernel."""
    kernel: tuple[int, ...] = getattr(layer, "kernel_size", ())
    return (matrix.shape[1] // math.prod(kernel), *kernel)
