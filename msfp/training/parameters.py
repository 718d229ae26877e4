"""What is trained: the LoRAs and their router, and the groups of parameters with their rates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from msfp.errors import InputError
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.lora.routers import ROUTERS
from msfp.layers.lora.talora import LoRAHub
from msfp.layers.packed import add_router
from msfp.layers.trainable import TrainableLayer, trainable_layers
from msfp.training.config import FinetuneConfig, LearningRates

MIN_SCALE = 0.1
"""Learned scales stay above this part of the searched one, so that they stay positive."""


@torch.no_grad()
def add_hubs(
    denoiser: nn.Module,
    config: FinetuneConfig,
    timesteps: torch.Tensor,
) -> None:
    """Give every trainable layer a hub of LoRAs, and the denoiser a router where there is a choice.

    Args:
        denoiser: Quantized and trainable; changed in place.
        config: Hub, rank, position, kind of routing and seed.
        timesteps: What the sampler gives the denoiser.
    """
    layers = trainable_layers(denoiser)
    generator = torch.Generator().manual_seed(config.seed)
    for layer in layers.values():
        layer.hub = _hub(layer, config, generator)
    if config.hub > 1:
        device = next(iter(layers.values())).weight.device
        kind = ROUTERS[config.routing]
        router = kind.new(len(layers), config.hub, timesteps.cpu(), generator)
        add_router(denoiser, router.to(device))


def _hub(layer: TrainableLayer, config: FinetuneConfig, generator: torch.Generator) -> LoRAHub:
    """Return the new hub of a layer."""
    rows, columns = layer.weight.flatten(1).shape
    step = layer.weight_quantizer.scale.mean()
    return LoRAHub(
        rows, columns, config.hub, config.rank, step.cpu(), generator,
        beside=config.lora_position == "beside",
    ).to(layer.weight.device)  # fmt: skip


def quantizers(layer: TrainableLayer) -> list[Quantizer]:
    """Return the quantizers that a layer has."""
    both = (layer.input_quantizer, layer.weight_quantizer)
    return [quantizer for quantizer in both if quantizer is not None]


def trained_parameters(denoiser: nn.Module, rates: LearningRates) -> dict[str, float]:
    """Return the learning rate of each parameter that is trained, by name.

    Unquantized weights, such as embeddings and layers that were excluded, are not trained.
    """
    trained = dict(_rates(denoiser, rates))
    return {name: rate for name, rate in trained.items() if rate > 0}


def check_rates(denoiser: nn.Module, config: FinetuneConfig) -> None:
    """Raise InputError unless a config leaves something to be trained of a trainable denoiser.

    Args:
        denoiser: Quantized and trainable, before it has hubs.
        config: With the rates.
    """
    rates = config.rates
    routed = rates.router > 0 and config.is_routed
    if not (rates.adapters > 0 or routed or trained_parameters(denoiser, rates)):
        raise InputError(f"rates must leave something to be trained, not {rates}")


def _rates(denoiser: nn.Module, rates: LearningRates) -> Iterator[tuple[str, float]]:
    """Yield names and rates, those of frozen groups as well."""
    for name, layer in trainable_layers(denoiser).items():
        if layer.hub is not None:
            yield f"{name}.hub.down", rates.adapters
            yield f"{name}.hub.up", rates.adapters
        weight = layer.weight_quantizer
        yield f"{name}.weight_quantizer.scale", rates.weight_scales * weight.scale.mean().item()
        inputs = layer.input_quantizer
        if inputs is not None:
            rate = rates.input_scales * inputs.scale.mean().item()
            for part, _ in inputs.named_parameters():
                yield f"{name}.input_quantizer.{part}", rate
    for name, module in denoiser.named_modules():
        prefix = f"{name}." if name else ""
        norm = "Norm" in type(module).__name__
        for part, _ in module.named_parameters(recurse=False):
            if name.split(".")[0] == "router":
                yield prefix + part, rates.router
            elif norm or part == "bias":
                yield prefix + part, rates.norms if norm else rates.biases


def optimizer_groups(
    parameters: dict[str, nn.Parameter], rates: dict[str, float]
) -> list[dict[str, Any]]:
    """Return the parameters that share a rate together, as an optimizer wants them."""
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        groups[rates[name]].append(parameter)
    return [{"params": group, "lr": rate, "initial_lr": rate} for rate, group in groups.items()]


class ScaleFloors:
    """Keeps learned scales above a part of what they are when this is made."""

    def __init__(self, denoiser: nn.Module) -> None:
        layers = trainable_layers(denoiser).values()
        self.scales = [quantizer.scale for layer in layers for quantizer in quantizers(layer)]
        self.floors = [MIN_SCALE * scale.detach() for scale in self.scales]

    @torch.no_grad()
    def apply(self) -> None:
        """Raise scales that have fallen below their floors."""
        for scale, floor in zip(self.scales, self.floors, strict=True):
            scale.clamp_(min=floor)
