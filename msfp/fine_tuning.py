"""Distilling the full-precision denoiser into the quantized one along the sampler's trajectory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from msfp.block_layers import refuse_block_layers
from msfp.config import FinetuneConfig
from msfp.dfa import timestep_weights
from msfp.errors import InputError
from msfp.layers import add_router
from msfp.open_layers import OpenLayer, open_layers
from msfp.quantization import seal
from msfp.quantizer import Quantizer
from msfp.talora import LoRAHub, Router
from msfp.trajectories import Trajectories

ROUTER_RATE = 1e-3
SCALE_RATE = 2e-3
"""Rate of scales and zero points, in units of each layer's own scale."""
BIAS_RATE = 2e-4
"""Rate of biases and norms."""
MIN_SCALE = 0.1
"""Learned scales stay above this part of the searched one, so that they stay positive."""


def add_hubs(denoiser: nn.Module, config: FinetuneConfig) -> None:
    """Give every open layer a hub of LoRAs, and the denoiser a router where there is a choice."""
    layers = open_layers(denoiser)
    generator = torch.Generator().manual_seed(config.seed)
    for layer in layers.values():
        rows, columns = layer.weight.flatten(1).shape
        step = layer.weight_quantizer.scale.mean()
        hub = LoRAHub(rows, columns, config.hub, config.rank, step.cpu(), generator)
        layer.hub = hub.to(layer.weight.device)
    if config.hub == 1:
        return
    device = next(iter(layers.values())).weight.device
    add_router(denoiser, Router(len(layers), config.hub, generator).to(device))


def quantizers(layer: OpenLayer) -> list[Quantizer]:
    """Return the quantizers that a layer has."""
    both = (layer.input_quantizer, layer.weight_quantizer)
    return [quantizer for quantizer in both if quantizer is not None]


def parameter_groups(denoiser: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Return what is trained, each group with its own rate; everything else is frozen."""
    denoiser.requires_grad_(False)
    layers = open_layers(denoiser)
    groups: list[dict[str, Any]] = []
    for layer in layers.values():
        if layer.hub is not None:
            groups.append({"params": list(layer.hub.parameters()), "lr": config.learning_rate})
        for quantizer in quantizers(layer):
            rate = SCALE_RATE * quantizer.scale.mean().item()
            groups.append({"params": list(quantizer.parameters()), "lr": rate})
    inside = tuple(
        f"{name}.{part}"
        for name in layers
        for part in ("weight", "hub.", "weight_quantizer.", "input_quantizer.")
    )
    named = dict(denoiser.named_parameters())
    router = [value for name, value in named.items() if name.startswith("router.")]
    rest = [value for name, value in named.items() if not name.startswith((*inside, "router."))]
    groups += [{"params": router, "lr": ROUTER_RATE}, {"params": rest, "lr": BIAS_RATE}]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    return groups


@torch.no_grad()
def keep_above(scales: list[torch.Tensor], floors: list[torch.Tensor]) -> None:
    """Raise scales that have fallen below their floors."""
    for scale, floor in zip(scales, floors, strict=True):
        scale.clamp_(min=floor)


def draw_batch(
    steps: int, count: int, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch: evenly spread sampler steps from a random offset, and random trajectories.

    Args:
        steps: Sampler steps to draw from.
        count: Trajectories to draw from.
        size: Samples in the batch.
        generator: Source of randomness.

    Returns:
        The index of the step and that of the trajectory of each sample, both of shape (size,).

    Example:
        >>> step, trajectory = draw_batch(20, 100, 5, torch.Generator().manual_seed(0))
        >>> step.tolist()
        [4, 8, 12, 16, 0]
    """
    offset = torch.randint(steps, (1,), generator=generator)
    step = (offset + torch.arange(size) * steps // size) % steps
    return step, torch.randint(count, (size,), generator=generator)


def finetune(
    denoiser: nn.Module,
    trajectories: Trajectories,
    config: FinetuneConfig,
    *,
    factors: dict[float, float] | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[float]:
    """Train the open layers of a quantized denoiser towards recorded predictions, then seal them.

    Each step lowers `w(t) * ||prediction - quantized prediction||^2` over a batch of recorded
    noisy samples, w the `timestep_weights` of the denoising factors. Trained are the LoRAs and
    the router, and with small rates the scales and zero points (LSQ, Esser et al., ICLR 2020),
    biases and norms.

    Args:
        denoiser: Quantized by `quantize`, open; changed in place.
        trajectories: Recorded from the full-precision denoiser.
        config: Hub, rank, steps, rate, power of the denoising factors, and seed.
        factors: The sampler's `denoising_factors`; needed unless their power is 0.
        progress: Called after each step with its loss.

    Returns:
        The loss of each step.

    Raises:
        InputError: If the denoiser has no open quantized layer, the factors are missing or of
            another sampler, or the loss is not finite.
    """
    refuse_block_layers(denoiser)
    layers = list(open_layers(denoiser).values())
    if not layers:
        raise InputError("denoiser must have been quantized and not yet sealed or fine-tuned")
    loss_weights = _loss_weights(trajectories.timesteps, factors, config.denoising_power)
    add_hubs(denoiser, config)
    groups = parameter_groups(denoiser, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
    scales = [quantizer.scale for layer in layers for quantizer in quantizers(layer)]
    floors = [MIN_SCALE * scale.detach() for scale in scales]
    generator = torch.Generator().manual_seed(config.seed)
    steps, count = trajectories.samples.shape[:2]
    losses: list[float] = []
    while len(losses) < config.steps:
        step, trajectory = draw_batch(steps, count, config.batch, generator)
        prediction = trajectories.predict(denoiser, step, trajectory)
        error = (prediction - trajectories.predictions[step, trajectory]).square().flatten(1)
        loss = (error.mean(dim=1) * loss_weights[step].to(error.device)).mean()
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {loss.item()} at step {len(losses)}: is the input finite?"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        keep_above(scales, floors)
        losses.append(loss.item())
        if progress is not None:
            progress(losses[-1])
    seal(denoiser)
    denoiser.requires_grad_(False)
    return losses


def _loss_weights(
    timesteps: torch.Tensor, factors: dict[float, float] | None, power: float
) -> torch.Tensor:
    """Return the loss weights in the order of the trajectories' timesteps."""
    if power == 0:
        return torch.ones(len(timesteps))
    if factors is None or not set(timesteps.tolist()) <= set(factors):
        raise InputError(
            f"factors must be given for every recorded timestep where denoising_power is {power}: "
            "measure them with the sampler and step count that recorded the trajectories"
        )
    weights = timestep_weights(factors, power)
    return torch.tensor([weights[t] for t in timesteps.tolist()])
