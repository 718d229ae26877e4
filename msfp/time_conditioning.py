"""What a denoiser makes of the timestep before its blocks read it."""

from __future__ import annotations

import copy

import torch
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from torch import nn

from msfp.errors import InputError

PROJECTIONS = (Timesteps, GaussianFourierProjection)


class TimeConditioning(nn.Module):
    """A denoiser's embedding of the timestep alone: its sinusoid and the perceptron after it.

    Args:
        projection: From timesteps of shape (n,) to (n, frequencies).
        embedding: From those to (n, width).

    Attributes:
        width: Features of the embedding.
    """

    def __init__(self, projection: nn.Module, embedding: TimestepEmbedding) -> None:
        super().__init__()
        self.projection, self.embedding = projection, embedding
        embedding.cond_proj = None  # of a condition, which is not the timestep
        self.width: int = embedding.linear_2.out_features

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return embeddings of mean 0 and variance 1, shape (n, width), of timesteps (n,)."""
        embedding = self.embedding(self.projection(timesteps))
        return nn.functional.layer_norm(embedding, (self.width,))


def time_conditioning(denoiser: nn.Module) -> TimeConditioning:
    """Return a frozen float32 copy of a denoiser's own embedding of the timestep.

    Args:
        denoiser: In full precision; or open, and then with the weights that it has now.

    Raises:
        InputError: If it has none.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(block_out_channels=(32,) * 4)
        >>> time_conditioning(unet)(torch.tensor([0, 999])).shape
        torch.Size([2, 128])
    """
    projection, embedding = _parts(denoiser)
    plain = {
        id(layer): _plain(layer) for layer in embedding.modules() if isinstance(layer, nn.Linear)
    }
    conditioning = TimeConditioning(copy.deepcopy(projection), copy.deepcopy(embedding, plain))
    return conditioning.float().requires_grad_(False)


def _parts(denoiser: nn.Module) -> tuple[nn.Module, TimestepEmbedding]:
    """Return the first sinusoid of the timestep that stands beside a perceptron, and that."""
    for module in denoiser.modules():
        parts = list(module.children())
        projection = next((part for part in parts if isinstance(part, PROJECTIONS)), None)
        embedding = next((part for part in parts if isinstance(part, TimestepEmbedding)), None)
        if projection is not None and embedding is not None:
            return projection, embedding
    raise InputError(
        f"routing must be learned or segments: {type(denoiser).__name__} has no TimestepEmbedding "
        "that a router could read"
    )


def _plain(layer: nn.Linear) -> nn.Linear:
    """Return a plain copy of a layer, which may be an open one."""
    rows, columns = layer.weight.shape
    plain = nn.Linear(columns, rows, layer.bias is not None, "meta")  # takes no random numbers
    plain.weight = nn.Parameter(layer.weight.detach().clone())
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain
