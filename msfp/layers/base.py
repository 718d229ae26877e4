"""What trainable and packed layers share: the forward, its routes through a hub, and branches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from msfp.errors import InputError
from msfp.layers.execution.backends import product
from msfp.layers.formats import BlockFormats, LayerFormats
from msfp.layers.kinds import KINDS, Kind, groups_of, kernel_shape, plain_class
from msfp.layers.lora.talora import Routing


class QuantizedLayer(nn.Module, ABC):
    """What trainable and packed layers share; mixed in before the nn class.

    Attributes:
        kind: How the plain layer computes.
        formats: Formats of weight and inputs.
        adapters: Weights that are held, one for each LoRA of a hub that there was.
        branch_down: Factor (rank, columns) of the low-rank branch beside the layer, which reads
            the input before it is rounded; with several branches, (adapters, rank, columns); None
            where there is no branch.
        branch_up: The other factor, (rows, rank), likewise.
        routing: The denoiser's routing, or None where there is one adapter.
        index: The layer's number in the routing.
    """

    kind: ClassVar[Kind]
    formats: LayerFormats | BlockFormats | None
    bias: Any  # a tensor or None; the nn classes do not agree on its annotation
    branch_down: torch.Tensor | None
    branch_up: torch.Tensor | None
    adapters: int = 1
    routing: Routing | None = None
    index: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(issubclass(cls, plain) for plain in KINDS):
            cls.kind = KINDS[plain_class(cls)]

    @property
    def choices(self) -> int:
        """How many weights, or else branches, there are to choose from."""
        formats = self.formats
        several = formats.branch_adapters if isinstance(formats, LayerFormats) else 1
        return max(self.adapters, several)

    @property
    def weights_are_routed(self) -> bool:
        """Whether samples have weights of their own, and not branches at most."""
        return self.routing is not None and self.adapters > 1

    @abstractmethod
    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded, same shape and dtype."""

    @abstractmethod
    def quantized_weight(self, adapter: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantized weight for an adapter of the hub."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize the input and apply the layer, each sample with the weight it is routed to."""
        return self.add_branch(x, self.product(x))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the quantized weight gives for the quantized input, bias included."""
        if self.weights_are_routed:
            return self._by_adapter(x, lambda part, adapter: product(self, part, adapter))
        return product(self, x, 0)

    def add_branch(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return an output with what the branch gives for the input, where there is a branch."""
        # A layer without formats is a plain one, which has no such attributes.
        if self.formats is None or self.branch_down is None or self.branch_up is None:
            return y
        return y + self.branches(x, self.branch_down, self.branch_up)

    def branches(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return what a branch gives for an input, or of several that to which a sample is routed.

        Args:
            x: The input.
            down: Factor (rank, columns), or (adapters, rank, columns).
            up: Factor (rows, rank), or (adapters, rows, rank).
        """
        if down.dim() == 2:
            return self.low_rank(x, down, up)
        return self._by_adapter(
            x, lambda part, adapter: self.low_rank(part, down[adapter], up[adapter])
        )

    @property
    def winners(self) -> torch.Tensor:
        """The adapter of each sample, shape (batch,), or (1,) where all have the same."""
        if self.routing is None:
            raise ValueError("the layer is not routed")
        return self.routing.winners[:, self.index]

    def _by_adapter(
        self, x: torch.Tensor, apply: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        """Apply to each sample what its adapter is for.

        Samples of one adapter are taken together, in the order that they have.
        """
        chosen, counts = self.winners.unique_consecutive(return_counts=True)
        adapters = chosen.tolist()
        used = sorted(set(adapters))
        if len(used) == 1:
            return apply(x, used[0])
        lengths = counts.tolist()
        parts: list[torch.Tensor] = [*x.split(lengths)]
        for adapter in used:
            runs = [run for run, winner in enumerate(adapters) if winner == adapter]
            # Of one run no copy is made, which the backward pass would hold.
            part = parts[runs[0]] if len(runs) == 1 else torch.cat([parts[run] for run in runs])
            y = apply(part, adapter)
            for run, own in zip(runs, y.split([lengths[run] for run in runs]), strict=True):
                parts[run] = own
        return torch.cat(parts)

    def compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply the plain layer with other parameters; padding is zero in real terms."""
        return self.kind.compute(self, x, weight, bias)

    def low_rank(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Apply the plain layer, without bias, with the weight `up @ down`.

        Convolutions go to `rank` channels and then mix them; grouped ones take the product.
        """
        if groups_of(self) > 1:
            return self.compute(x, (up @ down).view(-1, *kernel_shape(self, down)), None)
        return self.kind.mix(self.squeeze(x, down), up)

    def squeeze(self, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Apply the plain layer, without bias, with the rows of a factor as its weight."""
        return self.compute(x, down.view(len(down), *kernel_shape(self, down)), None)


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a denoiser by name, in definition order.

    A layer is one once it has formats; the plain layers that a LoRA is made of are not.
    """
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, QuantizedLayer) and module.formats is not None
    }


def refuse_quantized(name: str, network: nn.Module) -> None:
    """Raise InputError if a network, which an argument holds, has quantized layers."""
    if quantized_layers(network):
        raise InputError(f"{name} is quantized already: give one in full precision")
