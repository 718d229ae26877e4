"""Conv2d and Linear with quantized weights and inputs.

A layer is open while it holds the full-precision weight (and perhaps a hub of LoRAs), and sealed
once it holds nothing but quantized weights, one for each entry of the hub. Open layers can be
trained; only sealed ones are saved.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from msfp.quantizer import Quantizer
from msfp.summary import LayerSummary
from msfp.talora import LoRAHub, Router, Routing, attach_router


class QuantizedLayer(nn.Module, ABC):
    """What quantized convolutions and linear layers share; mixed in before the nn class.

    Attributes:
        weight: The full-precision weight while open, the first sealed entry afterwards.
        weight_quantizer: One scale for each output channel.
        input_quantizer: One scale, and a zero point where the format is unsigned.
        summary: What the search decided.
        hub: LoRAs added to the weight before it is quantized, or None.
        entries: Quantized weights of a sealed layer, shape `(entries, *weight.shape)`, or None.
        routing: The denoiser's routing, or None where there is one entry.
        index: The layer's number in the routing.
    """

    weight: torch.Tensor
    bias: Any  # a tensor or None; the nn classes do not agree on its annotation
    weight_quantizer: Quantizer
    input_quantizer: Quantizer
    summary: LayerSummary
    hub: LoRAHub | None
    entries: torch.Tensor | None
    routing: Routing | None
    index: int

    @classmethod
    def wrap(
        cls,
        layer: nn.Module,
        weight_quantizer: Quantizer,
        input_quantizer: Quantizer,
        summary: LayerSummary,
    ) -> Self:
        """Return an open quantized layer that shares the parameters of a plain one."""
        quantized = cls.__new__(cls)
        # Each container is copied, so that what is set on one layer is not set on the other.
        quantized.__dict__.update({key: copy.copy(value) for key, value in vars(layer).items()})
        quantized._modules, quantized._buffers = {}, {}
        quantized.weight_quantizer = weight_quantizer
        quantized.input_quantizer = input_quantizer
        quantized.summary = summary
        quantized.hub = None
        quantized.register_buffer("entries", None, persistent=False)
        quantized.routing, quantized.index = None, 0
        return quantized

    def quantized_weight(self, entry: int = 0) -> torch.Tensor:
        """Return the dequantized weight for an entry of the hub, shape `weight.shape`."""
        if self.entries is not None:
            return self.entries[entry]
        weight: torch.Tensor = self.weight
        if self.hub is not None:
            weight = weight + self.hub.correction(entry).view_as(weight)
        quantized: torch.Tensor = self.weight_quantizer(weight)
        return quantized

    @torch.no_grad()
    def seal(self, entries: torch.Tensor | None = None) -> None:
        """Keep the quantized weights alone: those given, or those of each entry of the hub."""
        if entries is None:
            count = 1 if self.hub is None else len(self.hub.up)
            entries = torch.stack([self.quantized_weight(entry) for entry in range(count)])
        self.entries = entries
        self.weight = nn.Parameter(entries[0], requires_grad=False)
        self.hub = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize the input and apply the layer, each sample with the weight it is routed to."""
        x = self.input_quantizer(x)
        if self.routing is None:
            return self.compute(x, self.quantized_weight())
        y = self._routed(x, self.routing.winners[:, self.index])
        choices = self.routing.choices[:, self.index]
        if self.hub is not None and choices.requires_grad:
            y = y + self._router_path(x, choices)
        return y

    def _routed(self, x: torch.Tensor, winners: torch.Tensor) -> torch.Tensor:
        """Apply to each sample the weight of its entry; `winners` has shape (1,) or (batch,)."""
        used = sorted(set(winners.tolist()))
        if len(used) == 1:
            return self.compute(x, self.quantized_weight(used[0]))
        rows = [(winners == entry).nonzero()[:, 0] for entry in used]
        parts = [
            self.compute(x[index], self.quantized_weight(entry))
            for index, entry in zip(rows, used, strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _router_path(self, x: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        """Return zeros that carry the gradient of each sample's choice.

        Straight through the quantizer, the output moves with the choice of an entry by what that
        entry adds to it: the layer applied with the entry's correction alone.
        """
        hub = self.hub
        assert hub is not None  # noqa: S101 - the caller has looked
        with torch.no_grad():
            added = [self.low_rank(x, *hub.factors(entry)) for entry in range(len(hub.up))]
        change = (choices - choices.detach()).T
        shape = (-1,) + (1,) * (added[0].dim() - 1)
        return torch.stack([c.view(shape) * y for c, y in zip(change, added, strict=True)]).sum(0)

    @abstractmethod
    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Apply the plain layer with another weight."""

    @abstractmethod
    def low_rank(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Apply the plain layer, without bias, with the weight `up @ down`."""


class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear with quantized weight and input."""

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Apply the matrix and the bias."""
        return F.linear(x, weight, self.bias)

    def low_rank(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Apply the two factors one after the other."""
        return F.linear(F.linear(x, down), up)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d with quantized weight and input; padding is zero in real terms."""

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Convolve and add the bias."""
        return self._convolve(x, weight, self.bias)

    def low_rank(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Convolve to `rank` channels, then mix them; grouped convolutions take the product."""
        kernel = self.weight.shape[1:]
        if self.groups > 1:
            return self._convolve(x, (up @ down).view(-1, *kernel), None)
        return F.conv2d(self._convolve(x, down.view(-1, *kernel), None), up[..., None, None])

    def _convolve(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y: torch.Tensor = self._conv_forward(x, weight, bias)
        return y


def quantized_class(layer: nn.Module) -> type[QuantLinear | QuantConv2d]:
    """Return the quantized counterpart of a layer's class."""
    return QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a denoiser by name, in definition order."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, QuantizedLayer)
    }


def add_router(denoiser: nn.Module, router: Router) -> None:
    """Attach a router to a denoiser and number its quantized layers in the routing."""
    routing = attach_router(denoiser, router)
    for index, layer in enumerate(quantized_layers(denoiser).values()):
        layer.routing, layer.index = routing, index


def seal(denoiser: nn.Module) -> None:
    """Seal every quantized layer of a denoiser."""
    for layer in quantized_layers(denoiser).values():
        layer.seal()
