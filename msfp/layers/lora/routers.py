"""Routers, which choose one adapter of each layer's hub at a timestep.

All layers share a router. It is learned, or fixed by time segments. Its only input is the timestep,
so its choices can be stored in a table. To add a router, add a class here and an entry to
`ROUTERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from msfp.layers.float32 import Float32Module
from msfp.layers.lora.time_embedding import TimeConditioning, time_conditioning

EMBEDDING_WIDTH = 128
TRAINING_TIMESTEPS = 1000


class _HardChoice(torch.autograd.Function):
    """One-hot of the largest probability; the gradient is passed on to the probabilities."""

    @staticmethod
    def forward(_ctx: Any, probabilities: torch.Tensor) -> torch.Tensor:
        winner = probabilities.argmax(dim=-1)
        return nn.functional.one_hot(winner, probabilities.shape[-1]).to(probabilities.dtype)

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


_hard_choice: Callable[[torch.Tensor], torch.Tensor] = _HardChoice.apply


class Router(Float32Module, ABC):
    """Chooses one adapter of each layer's hub at a timestep.

    Attributes:
        kind: Key of the class in `ROUTERS`, which checkpoints store.
        layers: Number of quantized layers in the denoiser.
        adapters: Number of LoRAs in each hub.
    """

    kind: ClassVar[str]

    def __init__(self, layers: int, adapters: int) -> None:
        super().__init__()
        self.layers, self.adapters = layers, adapters

    @classmethod
    @abstractmethod
    def new(
        cls, layers: int, adapters: int, timesteps: torch.Tensor, generator: torch.Generator
    ) -> Self:
        """Return a router to be trained.

        Args:
            layers: Number of quantized layers in the denoiser.
            adapters: Number of LoRAs in each hub.
            timesteps: Timesteps of the sampler, on the CPU.
            generator: Source of the initial weights.
        """

    @classmethod
    def placeholder(cls, layers: int, adapters: int, denoiser: nn.Module) -> Self:
        """Return an empty router for a plain denoiser, to be filled from a checkpoint.

        Raises:
            InputError: If the denoiser lacks the input of the router.
        """
        del denoiser
        return cls(layers, adapters)

    @abstractmethod
    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return one-hot choices of shape (n, layers, adapters) at timesteps of shape (n,)."""


class LearnedRouter(Router):
    """A router that is trained with the LoRAs.

    A two-layer perceptron maps an embedding of the timestep to one logit for each layer and
    adapter. The choice is hard forward and straight-through backward (section 4.2 of the paper).

    Args:
        layers: Number of quantized layers in the denoiser.
        adapters: Number of LoRAs in each hub.
        generator: Source of the initial weights, or None for torch's global generator.
        time_scale: Factor that scales timesteps to the range from 0 to about 1000.
        width: Number of features of the embedding.
    """

    kind = "learned"
    time_scale: torch.Tensor

    def __init__(
        self,
        layers: int,
        adapters: int,
        generator: torch.Generator | None = None,
        time_scale: float = 1.0,
        width: int = EMBEDDING_WIDTH,
    ) -> None:
        super().__init__(layers, adapters)
        self.register_buffer("time_scale", torch.tensor(time_scale))
        self.mlp = nn.Sequential(
            nn.Linear(width, EMBEDDING_WIDTH),
            nn.SiLU(),
            nn.Linear(EMBEDDING_WIDTH, layers * adapters),
        )
        for parameter in self.mlp.parameters():
            bound = EMBEDDING_WIDTH**-0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    @classmethod
    def new(
        cls, layers: int, adapters: int, timesteps: torch.Tensor, generator: torch.Generator
    ) -> Self:
        """Return a router with random weights."""
        # The timesteps of flow models are from 0 to 1.
        scale = float(TRAINING_TIMESTEPS) if timesteps.max() <= 1 else 1.0
        return cls(layers, adapters, generator, scale)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return one-hot choices of shape (n, layers, adapters) at timesteps of shape (n,)."""
        timesteps = timesteps.to(self.time_scale.device) * self.time_scale
        with torch.autocast(timesteps.device.type, enabled=False):
            logits = self.mlp(self.embedding(timesteps))
        logits = logits.unflatten(-1, (self.layers, self.adapters))
        return _hard_choice(logits.softmax(dim=-1))

    def embedding(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the input of the perceptron at timesteps, shape (n, width)."""
        embedding: torch.Tensor = get_timestep_embedding(timesteps, EMBEDDING_WIDTH)
        return embedding


class EmbeddingRouter(LearnedRouter):
    """A router whose input is the denoiser's embedding of the timestep.

    Checkpoints of msfp 0.2.0 may have this router. It was no better than `LearnedRouter`, so it is
    only loaded and no longer trained.

    Args:
        layers: Number of quantized layers in the denoiser.
        adapters: Number of LoRAs in each hub.
        conditioning: The denoiser's embedding of the timestep.
    """

    kind = "denoiser"

    def __init__(self, layers: int, adapters: int, conditioning: TimeConditioning) -> None:
        super().__init__(layers, adapters, width=conditioning.width)
        self.conditioning = conditioning

    @classmethod
    def placeholder(cls, layers: int, adapters: int, denoiser: nn.Module) -> Self:
        """Return an empty router with a copy of the denoiser's embedding."""
        return cls(layers, adapters, time_conditioning(denoiser))

    def embedding(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the input of the perceptron at timesteps, shape (n, width)."""
        embedding: torch.Tensor = self.conditioning(timesteps)
        return embedding


class SegmentRouter(Router):
    """A fixed router: all layers use the adapter of the time segment that has the timestep.

    Args:
        layers: Number of quantized layers in the denoiser.
        adapters: Number of LoRAs in each hub.
        boundaries: First timestep of each segment but the first, ascending, shape (adapters - 1,).

    Example:
        >>> router = SegmentRouter(1, 2, torch.tensor([500.0]))
        >>> router(torch.tensor([0, 499, 500])).argmax(-1).flatten().tolist()
        [0, 0, 1]
    """

    kind = "segments"
    boundaries: torch.Tensor

    def __init__(self, layers: int, adapters: int, boundaries: torch.Tensor | None = None) -> None:
        super().__init__(layers, adapters)
        empty = torch.zeros(adapters - 1)
        self.register_buffer("boundaries", empty if boundaries is None else boundaries.float())

    @classmethod
    def new(
        cls, layers: int, adapters: int, timesteps: torch.Tensor, generator: torch.Generator
    ) -> Self:
        """Return a router whose segments have equal numbers of the sampler's timesteps."""
        del generator
        ordered = timesteps.unique().sort().values.float()
        starts = [len(ordered) * adapter // adapters for adapter in range(1, adapters)]
        return cls(layers, adapters, ordered[starts])

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return one-hot choices of shape (n, layers, adapters) at timesteps of shape (n,)."""
        timesteps = timesteps.to(self.boundaries.device)
        adapter = (timesteps[:, None] >= self.boundaries).sum(dim=1)
        choice = nn.functional.one_hot(adapter, self.adapters).float()
        return choice[:, None].expand(-1, self.layers, -1)


ROUTERS: dict[str, type[Router]] = {
    "learned": LearnedRouter,
    "segments": SegmentRouter,
    "denoiser": EmbeddingRouter,
}
"""Routers by their names in checkpoints; `msfp.training.config.Routing` has those that can be
trained."""
