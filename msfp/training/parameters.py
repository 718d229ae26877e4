"""The trained parameters: LoRAs, their router, and parameter groups with learning rates."""

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
"""Lower bound of learned scales, as a fraction of the searched ones; it keeps them positive."""


@torch.no_grad()
def add_hubs(
    denoiser: nn.Module,
    config: FinetuneConfig,
    timesteps: torch.Tensor,
) -> None:
    """Add a hub of LoRAs to every trainable layer, and a router if a hub has several LoRAs.

    Args:
        denoiser: Quantized and trainable; changed in place.
        config: Hub, rank, position, kind of routing and seed.
        timesteps: The timesteps that the denoiser receives from the sampler.
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
    """Return the quantizers of a layer."""
    both = (layer.input_quantizer, layer.weight_quantizer)
    return [quantizer for quantizer in both if quantizer is not None]


def trained_parameters(denoiser: nn.Module, rates: LearningRates) -> dict[str, float]:
    """Return the learning rate of each parameter that is trained, by name.

    Unquantized weights, such as embeddings and layers that were excluded, are not trained.
    """
    trained = dict(_rates(denoiser, rates))
    return {name: rate for name, rate in trained.items() if rate > 0}


def check_rates(denoiser: nn.Module, config: FinetuneConfig) -> None:
    """Raise InputError unless a config trains at least one parameter.

    Args:
        denoiser: A quantized and trainable denoiser, before it has hubs.
        config: The config with the rates.
    """
    rates = config.rates
    routed = rates.router > 0 and config.is_routed
    if not (rates.adapters > 0 or routed or trained_parameters(denoiser, rates)):
        raise InputError(f"at least one rate must be above 0 for this model, not {rates}")


def _rates(denoiser: nn.Module, rates: LearningRates) -> Iterator[tuple[str, float]]:
    """Yield the names and rates of parameters, including frozen groups."""
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
    """Return the parameters in groups of equal rates, in the form that an optimizer expects."""
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        groups[rates[name]].append(parameter)
    return [{"params": group, "lr": rate, "initial_lr": rate} for rate, group in groups.items()]


class ScaleFloors:
    """Keeps learned scales above a fraction of their values at initialisation."""

    def __init__(self, denoiser: nn.Module) -> None:
        layers = trainable_layers(denoiser).values()
        self.scales = [quantizer.scale for layer in layers for quantizer in quantizers(layer)]
        self.floors = [MIN_SCALE * scale.detach() for scale in self.scales]

    @torch.no_grad()
    def apply(self) -> None:
        """Raise scales that have fallen below their floors."""
        for scale, floor in zip(self.scales, self.floors, strict=True):
            scale.clamp_(min=floor)
