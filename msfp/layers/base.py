"""What open and sealed layers share: the forward, its routes through a hub, and branches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from msfp.errors import InputError
from msfp.layers.formats import BlockFormats, LayerFormats
from msfp.layers.lora.talora import Routing


class QuantizedLayer(nn.Module, ABC):
    """What open and sealed layers share; mixed in before the nn class.

    Attributes:
        formats: Formats of weight and inputs.
        entries: Weights that are held, one for each LoRA of a hub that there was.
        branch_down: Factor (rank, columns) of the branch beside the layer, which reads its input
            before it is rounded; of several branches, entries first; None where there is no branch.
        branch_up: The other factor, (rows, rank), likewise.
        routing: The denoiser's routing, or None where there is one entry.
        index: The layer's number in the routing.
    """

    formats: LayerFormats | BlockFormats | None
    bias: Any  # a tensor or None; the nn classes do not agree on its annotation
    branch_down: torch.Tensor | None
    branch_up: torch.Tensor | None
    entries: int = 1
    routing: Routing | None = None
    index: int = 0

    @property
    def choices(self) -> int:
        """How many weights, or else branches, there are to choose from."""
        formats = self.formats
        several = formats.branch_entries if isinstance(formats, LayerFormats) else 1
        return max(self.entries, several)

    @property
    def weights_are_routed(self) -> bool:
        """Whether samples have weights of their own, and not branches at most."""
        return self.routing is not None and self.entries > 1

    @abstractmethod
    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded, same shape and dtype."""

    @abstractmethod
    def quantized_weight(self, entry: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantized weight for an entry of the hub."""

    def quantized_weights(
        self, entries: Sequence[int], dtype: torch.dtype
    ) -> Sequence[torch.Tensor]:
        """Return the dequantized weights for some entries of the hub."""
        return [self.quantized_weight(entry, dtype) for entry in entries]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize the input and apply the layer, each sample with the weight it is routed to."""
        rounded = self.quantize_input(x)
        if self.weights_are_routed:
            y = self._routed(rounded)
        else:
            y = self.compute(rounded, self.quantized_weight(0, x.dtype), self.bias)
        return self.add_branch(x, y)

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
            down: Factor (rank, columns), or (entries, rank, columns).
            up: Factor (rows, rank), or (entries, rows, rank).
        """
        if down.dim() == 2:
            return self.low_rank(x, down, up)
        return self._by_entry(x, lambda part, entry: self.low_rank(part, down[entry], up[entry]))

    def _routed(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to each sample the weight of its entry."""
        used = self.winners.unique().tolist()
        weights = dict(zip(used, self.quantized_weights(used, x.dtype), strict=True))
        return self._by_entry(x, lambda part, entry: self.compute(part, weights[entry], self.bias))

    @property
    def winners(self) -> torch.Tensor:
        """The entry of each sample, shape (batch,), or (1,) where all have the same."""
        if self.routing is None:
            raise ValueError("the layer is not routed")
        return self.routing.winners[:, self.index]

    def _by_entry(
        self, x: torch.Tensor, apply: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        """Apply to each sample what its entry is for.

        Samples of one entry are taken together, in the order that they have.
        """
        chosen, counts = self.winners.unique_consecutive(return_counts=True)
        entries = chosen.tolist()
        used = sorted(set(entries))
        if len(used) == 1:
            return apply(x, used[0])
        lengths = counts.tolist()
        parts: list[torch.Tensor] = [*x.split(lengths)]
        for entry in used:
            runs = [run for run, winner in enumerate(entries) if winner == entry]
            # Of one run no copy is made, which the backward pass would hold.
            part = parts[runs[0]] if len(runs) == 1 else torch.cat([parts[run] for run in runs])
            y = apply(part, entry)
            for run, own in zip(runs, y.split([lengths[run] for run in runs]), strict=True):
                parts[run] = own
        return torch.cat(parts)

    def compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply the plain layer with other parameters; padding is zero in real terms."""
        if isinstance(self, nn.Linear):
            return F.linear(x, weight, bias)
        y: torch.Tensor = self._conv_forward(x, weight, bias)  # type: ignore[operator]
        return y

    def low_rank(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Apply the plain layer, without bias, with the weight `up @ down`.

        Convolutions go to `rank` channels and then mix them; grouped ones take the product.
        """
        if self.groups_of_channels > 1:
            return self.compute(x, (up @ down).view(-1, *self._kernel_shape(down)), None)
        return self.mix(self.squeeze(x, down), up)

    @property
    def groups_of_channels(self) -> int:
        """Groups of a convolution; 1 for a linear layer."""
        groups: int = getattr(self, "groups", 1)
        return groups

    def squeeze(self, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Apply the plain layer, without bias, with the rows of a factor as its weight."""
        return self.compute(x, down.view(len(down), *self._kernel_shape(down)), None)

    def mix(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Apply a matrix (rows, columns) to the channels, or features, of each place."""
        if isinstance(self, nn.Linear):
            return F.linear(x, matrix)
        mix, places = (F.conv1d, 1) if isinstance(self, nn.Conv1d) else (F.conv2d, 2)
        return mix(x, matrix.view(*matrix.shape, *(1,) * places))

    def _kernel_shape(self, matrix: torch.Tensor) -> tuple[int, ...]:
        """Return the shape that a row of a matrix has in the weight."""
        kernel: tuple[int, ...] = getattr(self, "kernel_size", ())
        return (matrix.shape[1] // math.prod(kernel), *kernel)


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
