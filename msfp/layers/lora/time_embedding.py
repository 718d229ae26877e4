"""A denoiser's embedding of the timestep, the input of routers of earlier versions."""

from __future__ import annotations

import copy

import torch
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from torch import nn

from msfp.errors import InputError

PROJECTIONS = (Timesteps, GaussianFourierProjection)


class TimeConditioning(nn.Module):
    """A denoiser's embedding of the timestep, without other conditions: sinusoid and perceptron.

    Args:
        projection: Maps timesteps of shape (n,) to sinusoids of shape (n, frequencies).
        embedding: Maps sinusoids to embeddings of shape (n, width).

    Attributes:
        width: Number of features of the embedding.
    """

    def __init__(self, projection: nn.Module, embedding: TimestepEmbedding) -> None:
        super().__init__()
        self.projection, self.embedding = projection, embedding
        embedding.cond_proj = None  # it projects a condition other than the timestep
        self.width: int = embedding.linear_2.out_features

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return embeddings of timesteps (n,) with mean 0 and variance 1, shape (n, width)."""
        embedding = self.embedding(self.projection(timesteps.float()))
        return nn.functional.layer_norm(embedding, (self.width,))


def time_conditioning(denoiser: nn.Module) -> TimeConditioning:
    """Return a frozen float32 copy of a full-precision denoiser's embedding of the timestep.

    If there are several embeddings, such as one for the text only, this is the least deeply nested.

    Raises:
        InputError: If the denoiser has no embedding of the timestep.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(block_out_channels=(32,) * 4)
        >>> time_conditioning(unet)(torch.tensor([0, 999])).shape
        torch.Size([2, 128])
    """
    modules = sorted(denoiser.named_modules(), key=lambda named: named[0].count("."))
    for _, module in modules:
        parts = list(module.children())
        projection = next((part for part in parts if isinstance(part, PROJECTIONS)), None)
        embedding = next((part for part in parts if isinstance(part, TimestepEmbedding)), None)
        if projection is not None and embedding is not None:
            conditioning = TimeConditioning(copy.deepcopy(projection), copy.deepcopy(embedding))
            return conditioning.float().requires_grad_(False)
    raise InputError(
        f"{type(denoiser).__name__} has no embedding of the timestep, and the router of the "
        "checkpoint reads it"
    )
