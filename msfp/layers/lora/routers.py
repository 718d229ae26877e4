"""Routers: what chooses, for each layer, one LoRA of its hub at a timestep.

A router is shared by all layers. It is learned, from an embedding of the timestep of its own or
from the one that the denoiser has, or fixed by segments of time. It reads the timestep and nothing
else, so that its choices can be looked up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from msfp.layers.float32 import Float32Module
from msfp.layers.lora.time_embedding import TimeConditioning, time_conditioning

EMBEDDING_WIDTH = 128
TRAINING_TIMESTEPS = 1000
RouterKind = Literal["learned", "denoiser", "segments"]


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


class Router(Float32Module, ABC):
    """Chooses, for each layer, one LoRA of its hub at a timestep.

    Attributes:
        kind: What checkpoints call it.
        layers: Quantized layers in the denoiser.
        entries: LoRAs in each hub.
    """

    kind: RouterKind

    def __init__(self, layers: int, entries: int) -> None:
        super().__init__()
        self.layers, self.entries = layers, entries

    @abstractmethod
    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return one-hot choices of shape (n, layers, entries) at timesteps of shape (n,)."""


class LearnedRouter(Router):
    """A router that is trained with the LoRAs.

    An embedding of the timestep, then a two-layer perceptron to one logit for each layer and LoRA;
    the choice is hard forward and straight-through backward (section 4.2 of the paper).

    Args:
        layers: Quantized layers in the denoiser.
        entries: LoRAs in each hub.
        generator: Source of the initial weights, or None for torch's global one.
        time_scale: What timesteps are multiplied by, to reach from 0 to about 1000.
        conditioning: The denoiser's own embedding, which is not trained; None for a sinusoid.

    Attributes:
        temperature: Divides the logits; it changes the gradient of a choice, not the choice.
    """

    time_scale: torch.Tensor

    def __init__(
        self,
        layers: int,
        entries: int,
        generator: torch.Generator | None = None,
        time_scale: float = 1.0,
        conditioning: TimeConditioning | None = None,
    ) -> None:
        super().__init__(layers, entries)
        self.temperature = 1.0
        self.register_buffer("time_scale", torch.tensor(time_scale))
        self.conditioning = conditioning
        width = EMBEDDING_WIDTH if conditioning is None else conditioning.width
        self.mlp = nn.Sequential(
            nn.Linear(width, EMBEDDING_WIDTH),
            nn.SiLU(),
            nn.Linear(EMBEDDING_WIDTH, layers * entries),
        )
        for parameter in self.mlp.parameters():
            bound = EMBEDDING_WIDTH**-0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    @property
    def kind(self) -> RouterKind:  # type: ignore[override]
        """What it reads: an embedding of its own, or the denoiser's."""
        return "learned" if self.conditioning is None else "denoiser"

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return one-hot choices of shape (n, layers, entries) at timesteps of shape (n,)."""
        timesteps = timesteps.to(self.time_scale.device) * self.time_scale
        with torch.autocast(timesteps.device.type, enabled=False):
            logits = self.mlp(self._embedding(timesteps))
        logits = logits.unflatten(-1, (self.layers, self.entries))
        return _hard_choice((logits / self.temperature).softmax(dim=-1))

    def _embedding(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the perceptron reads at timesteps, shape (n, width)."""
        embedding: torch.Tensor
        if self.conditioning is None:
            embedding = get_timestep_embedding(timesteps, EMBEDDING_WIDTH)
        else:
            embedding = self.conditioning(timesteps)
        return embedding


class SegmentRouter(Router):
    """A fixed allocation: all layers take the LoRA of the segment of time that a timestep is in.

    Args:
        layers: Quantized layers in the denoiser.
        entries: LoRAs in each hub.
        boundaries: The timesteps where a new segment begins, ascending, shape (entries - 1,).

    Example:
        >>> router = SegmentRouter(1, 2, torch.tensor([500.0]))
        >>> router(torch.tensor([0, 499, 500])).argmax(-1).flatten().tolist()
        [0, 0, 1]
    """

    kind = "segments"
    boundaries: torch.Tensor

    def __init__(self, layers: int, entries: int, boundaries: torch.Tensor | None = None) -> None:
        super().__init__(layers, entries)
        empty = torch.zeros(entries - 1)
        self.register_buffer("boundaries", empty if boundaries is None else boundaries.float())

    @classmethod
    def evenly(cls, layers: int, entries: int, timesteps: torch.Tensor) -> SegmentRouter:
        """Return the router whose segments have equally many of a sampler's timesteps."""
        ordered = timesteps.unique().sort().values.float()
        starts = [len(ordered) * entry // entries for entry in range(1, entries)]
        return cls(layers, entries, ordered[starts])

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return one-hot choices of shape (n, layers, entries) at timesteps of shape (n,)."""
        timesteps = timesteps.to(self.boundaries.device)
        entry = (timesteps[:, None] >= self.boundaries).sum(dim=1)
        choice = nn.functional.one_hot(entry, self.entries).float()
        return choice[:, None].expand(-1, self.layers, -1)


def router_for(kind: RouterKind, layers: int, entries: int, denoiser: nn.Module) -> Router:
    """Return a router of a kind, to be filled with the tensors of a checkpoint.

    Args:
        kind: What it reads or follows.
        layers: Quantized layers in the denoiser.
        entries: LoRAs in each hub.
        denoiser: The plain network; a router of kind "denoiser" has its embedding of the timestep.

    Raises:
        InputError: If the denoiser has no such embedding.
    """
    if kind == "segments":
        return SegmentRouter(layers, entries)
    conditioning = time_conditioning(denoiser) if kind == "denoiser" else None
    return LearnedRouter(layers, entries, conditioning=conditioning)
