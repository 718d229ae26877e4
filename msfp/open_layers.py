"""Quantized layers that still hold the full-precision weight, and can be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from msfp.layers import (
    LayerFormats,
    QuantConv1d,
    QuantConv2d,
    QuantizedLayer,
    QuantLinear,
    SealedLayer,
    adopt,
)
from msfp.quantizer import Quantizer
from msfp.talora import LoRAHub

Convolution = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class OpenLayer(QuantizedLayer):
    """A layer that quantizes its weight at each forward, with gradients.

    Attributes:
        weight: The full-precision weight.
        weight_quantizer: One scale for each output channel.
        input_quantizer: One scale, and a zero point where the format is unsigned; None to leave
            inputs as they are.
        hub: LoRAs added to the weight before it is quantized, or beside it; or None.
        quantizing: False makes it the plain layer, in full precision.
    """

    sealed_class: type[SealedLayer]
    weight: torch.Tensor
    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    hub: LoRAHub | None
    quantizing: bool = True

    @classmethod
    def wrap(
        cls, layer: nn.Module, weight_quantizer: Quantizer, input_quantizer: Quantizer | None
    ) -> Self:
        """Return an open layer that shares the parameters of a plain one."""
        opened = adopt(cls, layer)
        opened.weight_quantizer = weight_quantizer
        opened.input_quantizer = input_quantizer
        opened.register_module("hub", None)
        return opened

    @property
    def formats(self) -> LayerFormats:  # type: ignore[override]
        """Formats of weight and inputs."""
        inputs = None if self.input_quantizer is None else self.input_quantizer.format
        return LayerFormats(self.weight_quantizer.format, inputs)

    def merged_weight(self, entry: int = 0) -> torch.Tensor:
        """Return the weight with the correction of an entry of the hub, before it is rounded."""
        if self.hub is None or self.hub.beside:
            return self.weight
        return self.weight + self.hub.correction(entry).view_as(self.weight)

    def quantized_weight(self, entry: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the rounded weight for an entry of the hub, in a dtype or that of the weight."""
        weight: torch.Tensor = self.weight_quantizer(self.merged_weight(entry))
        return weight.to(dtype)

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded, same shape and dtype."""
        if self.input_quantizer is None:
            return x
        rounded: torch.Tensor = self.input_quantizer(x)
        return rounded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the quantized layer, and the branch beside it; or the plain layer."""
        if not self.quantizing:
            return self.compute(x, self.weight)
        y = super().forward(x)
        return y + self._branch(x, self.hub) if self.hub is not None and self.hub.beside else y

    def _branch(self, x: torch.Tensor, hub: LoRAHub) -> torch.Tensor:
        """Return what the hub adds beside the layer: each sample's entry of it."""
        if self.routing is None:
            return self.low_rank(x, *hub.factors(0))
        choices = self.routing.choices[:, self.index].T
        added = [self.low_rank(x, *hub.factors(entry)) for entry in range(len(hub.up))]
        shape = (-1,) + (1,) * (added[0].dim() - 1)
        return torch.stack([c.view(shape) * y for c, y in zip(choices, added, strict=True)]).sum(0)

    @torch.no_grad()
    def seal(self) -> SealedLayer:
        """Return the sealed layer of the same outputs, with an entry for each of the hub."""
        count = 1 if self.hub is None else len(self.hub.up)
        weights = [self.merged_weight(entry) for entry in range(count)]
        return self.sealed_class.pack(self, weights, self.weight_quantizer, self.input_quantizer)

    def _routed(self, x: torch.Tensor, winners: torch.Tensor) -> torch.Tensor:
        """Apply to each sample the weight of its entry, with the gradient of the choice."""
        if self.hub is not None and self.hub.beside:
            return self.compute(x, self.quantized_weight(0, x.dtype))
        y = super()._routed(x, winners)
        if self.routing is None or self.hub is None:
            return y
        choices = self.routing.choices[:, self.index]
        return y + self._router_path(x, choices, self.hub) if choices.requires_grad else y

    def _router_path(self, x: torch.Tensor, choices: torch.Tensor, hub: LoRAHub) -> torch.Tensor:
        """Return zeros that carry the gradient of each sample's choice.

        Straight through the quantizer, the output moves with the choice of an entry by what that
        entry adds to it: the layer applied with the entry's correction alone.
        """
        with torch.no_grad():
            added = [self.low_rank(x, *hub.factors(entry)) for entry in range(len(hub.up))]
        change = (choices - choices.detach()).T
        shape = (-1,) + (1,) * (added[0].dim() - 1)
        return torch.stack([c.view(shape) * y for c, y in zip(change, added, strict=True)]).sum(0)

    def low_rank(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Apply the plain layer, without bias, with the weight `up @ down`.

        Convolutions go to `rank` channels and then mix them; grouped ones take the product.
        """
        if isinstance(self, nn.Linear):
            return F.linear(F.linear(x, down), up)
        kernel = self.weight.shape[1:]
        convolve: Convolution = self._conv_forward  # type: ignore[assignment]
        if self.groups > 1:  # type: ignore[operator]
            return convolve(x, (up @ down).view(-1, *kernel), None)
        mix = F.conv1d if isinstance(self, nn.Conv1d) else F.conv2d
        ones = (1,) * (len(kernel) - 1)
        return mix(convolve(x, down.view(-1, *kernel), None), up.view(*up.shape, *ones))

    def extra_repr(self) -> str:
        """Return what repr shows."""
        return f"{super().extra_repr()}, {self.formats}"


class OpenLinear(OpenLayer, nn.Linear):
    """nn.Linear with quantized weight and input, to be trained."""

    sealed_class = QuantLinear


class OpenConv1d(OpenLayer, nn.Conv1d):
    """nn.Conv1d with quantized weight and input, to be trained."""

    sealed_class = QuantConv1d


class OpenConv2d(OpenLayer, nn.Conv2d):
    """nn.Conv2d with quantized weight and input, to be trained."""

    sealed_class = QuantConv2d


OPEN_LAYERS: dict[type[nn.Module], type[OpenLayer]] = {
    nn.Linear: OpenLinear,
    nn.Conv1d: OpenConv1d,
    nn.Conv2d: OpenConv2d,
}
"""The open counterpart of each plain layer."""


def open_layers(denoiser: nn.Module) -> dict[str, OpenLayer]:
    """Return the open layers of a denoiser by name, in definition order."""
    return {
        name: module for name, module in denoiser.named_modules() if isinstance(module, OpenLayer)
    }
