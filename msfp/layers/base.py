"""Shared parts of trainable and packed layers: forward, adapter routing, low-rank branches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats import hadamard
from msfp.errors import InputError
from msfp.layers.branch_factor import BranchFactor
from msfp.layers.execution.backends import product
from msfp.layers.execution.grids import IntegerGrids
from msfp.layers.formats import BlockFormats, LayerFormats
from msfp.layers.kinds import KINDS, LayerKind, groups_of, kernel_shape, plain_class
from msfp.layers.lora.talora import Routing
from msfp.pipelines.denoiser import Networks, denoisers_of, networks_of

WEIGHT_AXIS = 1
"""The axis of the input channels in a weight."""


class QuantizedLayer(nn.Module, ABC):
    """Base class of trainable and packed layers, a mixin that precedes the nn class.

    Attributes:
        kind: The computation of the plain layer.
        formats: Formats of weight and inputs.
        adapters: Number of weights: one for each LoRA of the hub merged into them, or 1.
        branch_down: Factor (rank, columns) of the low-rank branch beside the layer, which reads
            the input before rounding. With several low-rank branches, (adapters, rank, columns).
            None if there is no low-rank branch.
        branch_up: The other factor, (rows, rank). With several low-rank branches, (adapters, rows,
            rank). None if there is no low-rank branch.
        routing: The denoiser's routing, or None if there is one adapter.
        index: The layer's number in the routing.
        rotation: Number of adjacent input channels that a Hadamard transform rotates before they
            are rounded, or 1. The weight is that of rotated inputs. Low-rank branches read the
            input as it is.
    """

    kind: LayerKind
    formats: LayerFormats | BlockFormats | None
    bias: Any  # a tensor or None; the nn classes do not agree on its annotation
    branch_down: torch.Tensor | None
    branch_up: torch.Tensor | None
    adapters: int = 1
    routing: Routing | None = None
    index: int = 0
    rotation: int = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(issubclass(cls, plain) for plain in KINDS):
            cls.kind = KINDS[plain_class(cls)]

    @property
    def plain(self) -> nn.Module:
        """The module with the attributes of the plain layer, such as its stride."""
        return self

    @property
    def choices(self) -> int:
        """Number of weights, or of low-rank branches, that the routing chooses from."""
        formats = self.formats
        several = formats.branch_adapters if isinstance(formats, LayerFormats) else 1
        return max(self.adapters, several)

    @property
    def weights_are_routed(self) -> bool:
        """Whether the routing chooses weights, and not only low-rank branches."""
        return self.routing is not None and self.adapters > 1

    @property
    @abstractmethod
    def integer_grids(self) -> IntegerGrids | str:
        """The operands as whole numbers times steps, or the reason why they are not."""

    @property
    def needs_gradient(self) -> bool:
        """Whether a parameter of the product needs a gradient."""
        return any(each.requires_grad for each in self.parameters())

    @property
    def keeps(self) -> bool:
        """Whether back ends may keep what they make of the weights."""
        return False

    def kept(self) -> dict[Any, Any]:
        """Return what has been made of the weights, if `keeps`; empty if they have changed."""
        return {}

    # Of layers that have integer grids.

    @property
    def weight_step(self) -> torch.Tensor:
        """Weight scales times the step of their format, float32, shape (rows,)."""
        raise ValueError(self.integer_grids)

    @property
    def input_shift(self) -> torch.Tensor | None:
        """The zero point of the inputs, float32, shape (), or None."""
        raise ValueError(self.integer_grids)

    def input_step(self, part: int) -> torch.Tensor:  # noqa: ARG002
        """Return an input scale times the step of its format, float32, shape ()."""
        raise ValueError(self.integer_grids)

    def input_steps(self, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return the input rounded to whole numbers of steps, float32, zero being 0."""
        raise ValueError(self.integer_grids)

    def weight_steps(self, adapter: int) -> torch.Tensor:  # noqa: ARG002
        """Return the weight for an adapter as whole numbers of steps, float32."""
        raise ValueError(self.integer_grids)

    @abstractmethod
    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded, same shape and dtype."""

    @abstractmethod
    def quantized_weight(self, adapter: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantized weight for an adapter of the hub."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
        """Quantize the input and apply the layer, each sample with the weight of its adapter."""
        if torch._C._get_tracing_state():  # compiled kernels would leave only their results
            raise InputError("quantized layers cannot be traced by torch.jit: use torch.export")
        return self.add_branch(input, self.product(input))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of the quantized weight and the quantized input, plus the bias."""
        x = self.rotated(x)
        if self.weights_are_routed:
            return self._by_adapter(x, lambda part, adapter: product(self, part, adapter))
        return product(self, x, 0)

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Return an input with groups of channels rotated, as the weight expects it."""
        if self.rotation == 1:
            return x
        turned: torch.Tensor = hadamard(x, self.rotation, axis=self.kind.channel_axis(x))
        return turned

    def unrotated_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight of rotated inputs as one of the inputs; or the reverse, as both are one.

        It is computed in float32.
        """
        if self.rotation == 1:
            return weight
        turned: torch.Tensor = hadamard(weight.float(), self.rotation, axis=WEIGHT_AXIS)
        return turned.to(weight.dtype)

    def add_branch(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return an output plus the output of the low-rank branch, if there is one."""
        # A layer without formats is a plain layer, without the attributes of low-rank branches.
        if self.formats is None or self.branch_down is None or self.branch_up is None:
            return y
        return self.add_branches(x, y, self.branch_down, self.branch_up)

    def add_branches(
        self, x: torch.Tensor, y: torch.Tensor, down: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        """Return an output plus that of the low-rank branch that each sample is routed to.

        Args:
            x: The input before rounding.
            y: The output, which may be overwritten.
            down: Factor (rank, columns), or (adapters, rank, columns).
            up: Factor (rows, rank), or (adapters, rows, rank).
        """
        if down.dim() > 2:
            return y + self._by_adapter(
                x, lambda part, adapter: self._branch(part, down[adapter], up[adapter], adapter)
            )
        if groups_of(self) > 1 or torch.is_autocast_enabled(x.device.type):
            return y + self._branch(x, down, up, 0)
        return self.kind.add_mixed(y, self._squeezed(x, down, 0), up)

    def _branch(
        self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, adapter: int
    ) -> torch.Tensor:
        """Return the output of a low-rank branch."""
        if groups_of(self) > 1:
            return self.low_rank(x, down, up)
        return self.kind.mix(self._squeezed(x, down, adapter), up)

    def _squeezed(self, x: torch.Tensor, down: torch.Tensor, adapter: int) -> torch.Tensor:
        """Return the output of the first factor of a low-rank branch."""
        factor = self.branch_factor(down, adapter)
        return self.squeeze(x, down) if factor is None else product(factor, x, 0)

    def branch_factor(self, down: torch.Tensor, adapter: int) -> BranchFactor | None:
        """Return the first factor of a low-rank branch in 8 bits; None in full precision.

        Args:
            down: The factor (rank, columns).
            adapter: Its number, where the routing chooses, else 0.
        """
        del down, adapter
        return None

    @property
    def winners(self) -> torch.Tensor:
        """The adapter of each sample, shape (batch,), or (1,) if all samples have the same."""
        if self.routing is None:
            raise AttributeError("the layer is not routed")
        return self.routing.winners[:, self.index]

    def _by_adapter(
        self, x: torch.Tensor, apply: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> torch.Tensor:
        """Call `apply` for the samples of each adapter, and return the outputs in sample order.

        All samples of one adapter are one batch, in their original order.
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
            # A single run is not copied, because the backward pass would keep the copy.
            part = parts[runs[0]] if len(runs) == 1 else torch.cat([parts[run] for run in runs])
            y = apply(part, adapter)
            for run, own in zip(runs, y.split([lengths[run] for run in runs]), strict=True):
                parts[run] = own
        return torch.cat(parts)

    def compute(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply the plain layer with other parameters; zero padding is exactly zero."""
        return self.kind.compute(self, x, weight, bias)

    def low_rank(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Apply the plain layer, without bias, with the weight `up @ down`.

        A convolution maps to `rank` channels and then mixes them. A grouped convolution uses the
        product of the factors.
        """
        if groups_of(self) > 1:
            return self.compute(x, (up @ down).view(-1, *kernel_shape(self, down)), None)
        return self.kind.mix(self.squeeze(x, down), up)

    def squeeze(self, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Apply the plain layer, without bias, with the rows of a factor as its weight."""
        return self.compute(x, down.view(len(down), *kernel_shape(self, down)), None)


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a denoiser by name, in definition order.

    A layer is quantized if it has formats. The plain layers of a LoRA have none.
    """
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, QuantizedLayer) and module.formats is not None
    }


def quantized_networks(model: DiffusionPipeline | nn.Module) -> Networks:
    """Return the networks of a pipeline that have quantized layers, by component."""
    denoisers_of(model)
    return {name: each for name, each in networks_of(model).items() if quantized_layers(each)}


def refuse_quantized(name: str, network: nn.Module) -> None:
    """Raise InputError if a network, the value of the argument `name`, has quantized layers."""
    if quantized_layers(network):
        raise InputError(f"{name} is quantized already: it must be in full precision")
