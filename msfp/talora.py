"""Timestep-aware LoRA: a hub of low-rank adapters for each layer, and the router that chooses.

The router is shared by all layers. Its choices for the current forward stand in a `Routing` that
every layer reads, so that nothing depends on how often or in what order the denoiser is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from msfp.denoiser import timestep_of
from msfp.float32 import Float32Module

EMBEDDING_WIDTH = 128


class LoRAHub(nn.Module):
    """Low-rank corrections of one weight matrix, in units of its mean quantization step.

    The correction of entry k is `step * up[k] @ down[k]`; `up` starts at zero. Measuring it in
    steps lets one learning rate serve all layers.

    Args:
        out_features: Rows of the matrix.
        in_features: Columns; for a convolution input channels times kernel size.
        entries: LoRAs in the hub.
        rank: Rank of each.
        step: The mean weight scale.
        generator: Source of the initial `down`.
    """

    step: torch.Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        entries: int,
        rank: int,
        step: torch.Tensor,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        down = torch.randn(entries, rank, in_features, generator=generator) / rank**0.5
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(entries, out_features, rank))
        self.register_buffer("step", step.detach().clone())

    def factors(self, entry: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors (rank, in_features) and (out_features, rank) of an entry."""
        return self.down[entry], self.step * self.up[entry]

    def correction(self, entry: int) -> torch.Tensor:
        """Return the correction of an entry, shape (out_features, in_features)."""
        down, up = self.factors(entry)
        return up @ down


class _HardChoice(torch.autograd.Function):
    """One-hot of the largest probability, with the gradient handed to the probabilities."""

    @staticmethod
    def forward(_ctx: Any, probabilities: torch.Tensor) -> torch.Tensor:
        winner = probabilities.argmax(dim=-1)
        return nn.functional.one_hot(winner, probabilities.shape[-1]).to(probabilities.dtype)

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


_hard_choice: Callable[[torch.Tensor], torch.Tensor] = _HardChoice.apply


class Router(Float32Module):
    """Chooses, for each layer, one LoRA of its hub at a timestep.

    Sinusoidal timestep embedding, then a two-layer perceptron to one logit for each layer and
    LoRA; the choice is hard forward and straight-through backward (section 4.2 of the paper).

    Args:
        layers: Quantized layers in the denoiser.
        entries: LoRAs in each hub.
        generator: Source of the initial weights, or None for torch's global one.
    """

    def __init__(self, layers: int, entries: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.layers, self.entries = layers, entries
        self.mlp = nn.Sequential(
            nn.Linear(EMBEDDING_WIDTH, EMBEDDING_WIDTH),
            nn.SiLU(),
            nn.Linear(EMBEDDING_WIDTH, layers * entries),
        )
        for parameter in self.parameters():
            bound = EMBEDDING_WIDTH**-0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return one-hot choices of shape (n, layers, entries) at timesteps of shape (n,)."""
        device = next(self.parameters()).device
        embedding = get_timestep_embedding(timesteps.to(device), EMBEDDING_WIDTH)
        with torch.autocast(device.type, enabled=False):
            logits = self.mlp(embedding).unflatten(-1, (self.layers, self.entries))
        return _hard_choice(logits.softmax(dim=-1))


class Routing:
    """The router's choices for the forward that is running.

    Attributes:
        choices: One-hot, shape (n, layers, entries), n the batch size or 1 where all samples are
            at one timestep.
        winners: The entry chosen, shape (n, layers), on the CPU.
    """

    def __init__(self) -> None:
        self.choices = torch.empty(0)
        self.winners = torch.empty(0, dtype=torch.int64)

    def update(self, router: Router, timesteps: torch.Tensor) -> None:
        """Route a batch whose timesteps are given, shape (1,) or (batch,)."""
        if (timesteps == timesteps[0]).all():
            timesteps = timesteps[:1]
        self.choices = router(timesteps)
        self.winners = self.choices.argmax(dim=-1).cpu()


class RouterHook:
    """Forward pre-hook of a denoiser that routes each call by its timestep argument."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Update the routing from the call's timestep."""
        router: Router = denoiser.get_submodule("router")  # type: ignore[assignment]
        self.routing.update(router, timestep_of(denoiser, args, kwargs))


def attach_router(denoiser: nn.Module, router: Router) -> Routing:
    """Make the router part of the denoiser, run at the start of each of its forwards."""
    routing = Routing()
    denoiser.add_module("router", router)
    denoiser.register_forward_pre_hook(RouterHook(routing), with_kwargs=True)
    return routing
