"""Quantized layers that have the full-precision weight and can be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn
from torch.nn.utils import parametrize

from msfp.errors import InputError
from msfp.layers.base import QuantizedLayer
from msfp.layers.branch_factor import BranchFactor
from msfp.layers.execution.grids import IntegerGrids, integer_grids
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.formats import LayerFormats
from msfp.layers.kinds import groups_of
from msfp.layers.lora.talora import LoRAHub
from msfp.layers.packed import PackedLayer, adopt
from msfp.layers.scaled import ScaledLayer


class TrainableLayer(QuantizedLayer):
    """A layer that quantizes its weight at each forward, with gradients.

    Attributes:
        weight: The full-precision weight.
        weight_quantizer: Quantizer of the weight, with one scale for each output channel.
        input_quantizer: Quantizer of the input, with one scale or one for each channel, and with a
            zero point if the format is unsigned. None leaves inputs unquantized.
        branch_grid: Scale and zero point of the input of a low-rank branch in 8 bits, if one is
            added. None if such a branch must be in full precision.
        branch_input: Quantizer of the input of the low-rank branch in 8 bits; None for a branch in
            full precision, or for none.
        hub: LoRAs that are added to the weight before it is quantized, or that are beside the
            weight; or None.
        quantizing: Whether to quantize. False computes the plain layer, in full precision.
    """

    packed_class: type[ScaledLayer]
    weight: torch.Tensor
    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    branch_grid: tuple[float, float] | None
    branch_input: Quantizer | None
    hub: LoRAHub | None
    quantizing: bool = True

    def __init__(self, *_: Any, **__: Any) -> None:
        # PEFT makes the convolutions of a LoRA of the class of the layer below.
        raise InputError(
            f"{type(self).__name__} is made by msfp.quantize alone: call msfp.pack before a LoRA "
            "of PEFT is put on top of it"
        )

    @classmethod
    def wrap(
        cls,
        layer: nn.Module,
        weight_quantizer: Quantizer,
        input_quantizer: Quantizer | None,
        branch_grid: tuple[float, float] | None = None,
    ) -> Self:
        """Return a trainable layer that shares the parameters of a plain one."""
        trainable = adopt(cls, layer)
        trainable.weight_quantizer = weight_quantizer
        trainable.input_quantizer = input_quantizer
        trainable.branch_grid = branch_grid
        trainable.register_module("branch_input", None)
        trainable.register_module("hub", None)
        trainable.register_parameter("branch_down", None)
        trainable.register_parameter("branch_up", None)
        return trainable

    @property
    def formats(self) -> LayerFormats:  # type: ignore[override]
        """Formats of weight and inputs."""
        quantizers = self.weight_quantizer, self.input_quantizer
        return LayerFormats.of(*quantizers, self.branch_up, self.branch_input, self.rotation)

    def merged_weight(self, adapter: int = 0) -> torch.Tensor:
        """Return the weight plus the correction of an adapter of the hub, before rounding."""
        if self.hub is None or self.hub.beside:
            return self.weight
        return self.weight + self.hub.correction(adapter).view_as(self.weight)

    def quantized_weight(self, adapter: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the rounded weight for an adapter; dtype None is the dtype of the weight."""
        weight: torch.Tensor = self.weight_quantizer(self.merged_weight(adapter))
        return weight.to(dtype)

    @property
    def integer_grids(self) -> IntegerGrids | str:
        """The operands as whole numbers times steps, or the reason why they are not."""
        inputs, shape = self.input_quantizer, self.weight.shape
        groups = groups_of(self)
        return integer_grids(
            self.weight_quantizer.format,
            None if inputs is None else inputs.format,
            None if inputs is None else inputs.scale.detach(),
            whole=inputs is None or inputs.whole,
            terms=shape[1:].numel(),
            channels=shape[1] * groups,
            groups=groups,
            by_token=inputs is not None and inputs.by_token,
        )

    @property
    def weight_step(self) -> torch.Tensor:
        """Weight scales times the step of their format, float32, shape (rows,)."""
        return self.weight_quantizer.step.view(-1)

    @property
    def input_shift(self) -> torch.Tensor | None:
        """The zero point of the inputs, float32, shape (), or None."""
        shift = None if self.input_quantizer is None else self.input_quantizer.shift
        return None if shift is None else shift.detach()

    def input_step(self, part: int) -> torch.Tensor:
        """Return an input scale times the step of its format, float32, shape ()."""
        if self.input_quantizer is None:
            raise ValueError("the inputs of the layer are not quantized")
        steps: torch.Tensor = self.input_quantizer.step.flatten().unique_consecutive()
        return steps[part]

    def input_steps(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded to whole numbers of steps, float32, zero being 0."""
        if self.input_quantizer is None:
            raise ValueError("the inputs of the layer are not quantized")
        return self.input_quantizer.steps(x)

    def weight_steps(self, adapter: int) -> torch.Tensor:
        """Return the weight for an adapter as whole numbers of steps, float32."""
        return self.weight_quantizer.steps(self.merged_weight(adapter))

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded, same shape and dtype."""
        if self.input_quantizer is None:
            return x
        rounded: torch.Tensor = self.input_quantizer(x)
        return rounded

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
        """Apply the quantized layer, or the plain layer if `quantizing` is False."""
        # All processes must compute a parametrized weight equally often, so it is computed once.
        with parametrize.cached() if parametrize.is_parametrized(self) else nullcontext():
            return self._forward(input)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantizing:
            return super().forward(x)
        return self.in_full_precision(x, self.weight, self.bias)

    def in_full_precision(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output of the plain layer and its low-rank branch, with nothing rounded.

        The weight is that of rotated inputs.
        """
        y = self.compute(self.rotated(x), weight, bias)
        if self.branch_down is None or self.branch_up is None:
            return y
        return y + self.low_rank(x, self.branch_down, self.branch_up)

    @property
    def weights_are_routed(self) -> bool:
        """Whether the hub is inside the quantizer and the routing chooses its adapters."""
        return self.routing is not None and not self._hub_is_beside

    @property
    def _hub_is_beside(self) -> bool:
        return self.hub is not None and self.hub.beside

    def add_branch(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return an output plus the outputs of the low-rank branch and a hub beside the weight."""
        down, up = self._beside()
        if down is None or up is None:
            return y
        y = self.add_branches(x, y, down, up)
        return self._chosen(y, x) if self._hub_is_beside else y

    def _beside(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the joint factors of low-rank branch and hub beside the weight, in its dtype."""
        if self.hub is None or not self.hub.beside:
            return self.branch_down, self.branch_up
        factors = self.hub.factors(0) if len(self.hub.up) == 1 else self.hub.all_factors()
        down, up = (factor.to(self.weight.dtype) for factor in factors)
        if self.branch_down is None or self.branch_up is None:
            return down, up
        own_down = self.branch_down.expand(*down.shape[:-2], -1, -1)
        own_up = self.branch_up.expand(*up.shape[:-2], -1, -1)
        return torch.cat([own_down, down], dim=-2), torch.cat([own_up, up], dim=-1)

    def branch_factor(self, down: torch.Tensor, adapter: int) -> BranchFactor | None:
        """Return the first factor of a low-rank branch in 8 bits; None in full precision."""
        del adapter
        if self.branch_input is None:
            return None
        return BranchFactor(self, self.kind, down, self.branch_input, keeps=False)

    @torch.no_grad()
    def pack(self) -> PackedLayer:
        """Return a packed layer with the same outputs and an adapter for each one of the hub.

        A weight that is sharded across processes is gathered permanently.
        """
        if parametrize.is_parametrized(self, "weight"):
            parametrize.remove_parametrizations(self, "weight", leave_parametrized=True)
        count = 1 if self.hub is None or self.hub.beside else len(self.hub.up)
        weights = [self.merged_weight(adapter) for adapter in range(count)]
        layer = adopt(type(self), self)
        for name, factor in zip(("branch_down", "branch_up"), self._beside(), strict=True):
            kept = None if factor is None else nn.Parameter(factor, requires_grad=False)
            layer.register_parameter(name, kept)
        return self.packed_class.of_weights(
            layer,
            weights,
            self.weight_quantizer,
            self.input_quantizer,
            self.branch_input,
        )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with the rounded weight, with the gradient of the choice if routed."""
        y = super().product(x)
        return self._chosen(y, x) if self.weights_are_routed else y

    def _chosen(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return an output with the gradient of the choice; `x` is the layer's input."""
        if self.routing is None or self.hub is None or not torch.is_grad_enabled():
            return y
        choices = self.routing.choices[:, self.index]
        scale = self.routing.gradient_scale(self.index)
        if not scale or not choices.requires_grad:
            return y
        read = x if self._hub_is_beside else self.quantize_input(self.rotated(x)).detach()
        routed: torch.Tensor = _choose(y, scale * choices, read, self)
        return routed

    def gains(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Return the loss gradient along each adapter's correction, shape (batch, adapters).

        This is the inner product, in float32, of the output's gradient and the output of the layer
        with only the correction as its weight. Each factor of the correction is applied to one of
        the two sides. Except for grouped convolutions, no tensor of the output's size is computed.

        Args:
            x: The input, rounded if the hub is inside the quantizer.
            grad: The gradient of the output, in any dtype.
        """
        if self.hub is None:
            raise ValueError("the layer has no hub")
        down, up = (factor.to(grad.dtype) for factor in self.hub.all_factors())
        x, adapters = x.to(grad.dtype), range(len(up))
        if groups_of(self) > 1:
            added = [self.low_rank(x, down[adapter], up[adapter]) for adapter in adapters]
            return torch.stack([(y.float() * grad).flatten(1).sum(1) for y in added], dim=1)
        inner = self.squeeze(x, down.flatten(0, 1))
        outer = self.kind.mix(grad, up.mT.flatten(0, 1))
        channels = self.kind.channel_axis(grad)
        product = (inner.float() * outer).movedim(channels, 1).unflatten(1, (len(up), -1))
        gained: torch.Tensor = product.flatten(2).sum(2)
        return gained

    def extra_repr(self) -> str:
        """Return the description in `repr`."""
        return f"{super().extra_repr()}, {self.formats}"


class _Choice(torch.autograd.Function):
    """Returns an output unchanged, with the gradient of each sample's choice of an adapter.

    The gradient is straight-through at the quantizer: the derivative of the output with respect to
    the choice of an adapter is that adapter's contribution to the output.
    """

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, choices: torch.Tensor, x: torch.Tensor, layer: TrainableLayer
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.like = layer, choices
        return y.clone()  # a view could not be modified in place

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        gains = ctx.layer.gains(x, grads[0]).sum_to_size(ctx.like.shape)
        return grads[0], gains.to(ctx.like.dtype), None, None


_choose: Callable[..., torch.Tensor] = _Choice.apply


def trainable_layers(denoiser: nn.Module) -> dict[str, TrainableLayer]:
    """Return the trainable layers of a denoiser by name, in definition order."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, TrainableLayer)
    }


@contextmanager
def full_precision(denoiser: nn.Module) -> Iterator[None]:
    """Let the trainable layers of a denoiser compute in full precision inside a `with` block."""
    layers = trainable_layers(denoiser).values()
    before = [layer.quantizing for layer in layers]
    try:
        for layer in layers:
            layer.quantizing = False
        yield
    finally:
        for layer, quantizing in zip(layers, before, strict=True):
            layer.quantizing = quantizing


def untrained_layers(denoiser: nn.Module) -> dict[str, TrainableLayer]:
    """Return the trainable layers; raise InputError if there are none, or any has LoRAs."""
    layers = trainable_layers(denoiser)
    if not layers or any(layer.hub is not None for layer in layers.values()):
        raise InputError("denoiser must have been quantized and not yet packed or fine-tuned")
    return layers
