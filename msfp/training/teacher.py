"""The full-precision denoiser inside the trainable one: both share the untrained parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from msfp.errors import InputError
from msfp.layers.attention import AttentionProducts
from msfp.layers.lora.talora import RouterHook
from msfp.layers.trainable import TrainableLayer, trainable_layers
from msfp.training.sharding import shard_weights


class Teacher:
    """Makes a trainable denoiser temporarily compute the same as its full-precision original.

    Trainable layers hold the full-precision weights. Copies are kept only of parameters that
    training changes.

    Args:
        denoiser: Quantized and trainable.
        original: The full-precision denoiser, if the trainable one no longer holds all its
            parameters. None takes the current parameters of the trainable one.

    Raises:
        InputError: If the original has another architecture.
    """

    def __init__(self, denoiser: nn.Module, original: nn.Module | None = None) -> None:
        self.denoiser = denoiser
        self._kept: dict[str, torch.Tensor] = {}
        self._given = original is not None
        if original is None:
            return
        parameters = dict(denoiser.named_parameters())
        check_same_parameters(original, parameters)
        layers = trainable_layers(denoiser)
        for name, value in original.named_parameters():
            layer = layers.get(name.removesuffix(".weight"))
            full = value.detach().to(parameters[name].device)
            if layer is not None and name.endswith(".weight"):
                full = layer.unrotated_weight(full)  # which rotates it
            if not torch.equal(full, parameters[name]):
                self._kept[name] = full
        for name, value in parameters.items():
            if name.rpartition(".")[2] == "branch_up":  # the original's weights still contain it
                self._kept[name] = torch.zeros_like(value)

    @property
    def is_whole(self) -> bool:
        """Whether the full-precision weights are known: refinement replaces them by grid values."""
        return self._given or not any(
            torch.equal(layer.weight, layer.quantized_weight())
            for layer in trainable_layers(self.denoiser).values()
        )

    def keep(self, names: Iterable[str]) -> None:
        """Keep copies of parameters that are about to be trained."""
        parameters = dict(self.denoiser.named_parameters())
        new_parts = ("hub", "weight_quantizer", "input_quantizer", "branch_input", "router")
        for name in names:
            if name not in self._kept and not set(name.split(".")) & set(new_parts):
                self._kept[name] = parameters[name].detach().clone()

    def shard(self) -> None:
        """Divide the weights among the processes, including kept weights of the original."""
        for name, (part, gathered) in shard_weights(self.denoiser).items():
            if name in self._kept:
                self._kept[part] = gathered.right_inverse(self._kept.pop(name))

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Yield the denoiser, in full precision inside the `with` block."""
        parameters = dict(self.denoiser.named_parameters())
        trained = {name: parameters[name].data for name in self._kept}
        hooks = self.denoiser._forward_pre_hooks
        routed = {key: hook for key, hook in hooks.items() if isinstance(hook, RouterHook)}
        try:
            for key in routed:
                del hooks[key]
            self._switch(self._kept, parameters, quantizing=False)
            with torch.no_grad():
                yield self.denoiser
        finally:
            self._switch(trained, parameters, quantizing=True)
            hooks.update(routed)

    def _switch(
        self,
        values: dict[str, torch.Tensor],
        parameters: dict[str, nn.Parameter],
        *,
        quantizing: bool,
    ) -> None:
        """Turn quantization on or off, and set parameters to given values."""
        for module in self.denoiser.modules():
            if isinstance(module, TrainableLayer | AttentionProducts):
                module.quantizing = quantizing
        for name, value in values.items():
            parameters[name].data = value


def check_same_parameters(
    original: nn.Module, parameters: dict[str, nn.Parameter] | dict[str, torch.Tensor]
) -> None:
    """Raise InputError unless a denoiser has the parameters of its full-precision original."""
    kind = type(original).__name__
    for name, value in original.named_parameters():
        if name not in parameters:
            raise InputError(
                f"original must be the model that was quantized: only its {kind} has {name}"
            )
        if parameters[name].shape != value.shape:
            raise InputError(
                f"original must be the model that was quantized: {name} of its {kind} has the "
                f"shape {tuple(value.shape)}, not {tuple(parameters[name].shape)}"
            )
