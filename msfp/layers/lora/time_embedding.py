"""What a denoiser makes of the timestep before its blocks read it."""

from __future__ import annotations

import copy
import math

import torch
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from torch import nn

from msfp.errors import InputError
from msfp.pipelines.trajectories import Trajectories

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
        embedding = self.embedding(self.projection(timesteps.float()))
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


def time_scale(denoiser: nn.Module, trajectories: Trajectories) -> float:
    """Return what a denoiser multiplies timesteps by before it embeds them.

    Args:
        denoiser: Has an embedding of the timestep.
        trajectories: Of the denoiser, which is asked once more at the largest timestep of them.

    Raises:
        InputError: If it does not embed the timestep that it is given.
    """
    read: list[float] = []
    projection, _ = _parts(denoiser)
    handle = projection.register_forward_pre_hook(
        lambda _module, args: read.append(args[0].flatten()[0].item())
    )
    step = trajectories.timesteps.abs().argmax().reshape(1)
    try:
        with torch.no_grad():
            trajectories.predict(denoiser, step, torch.zeros_like(step))
    finally:
        handle.remove()
    ratio = (read or [0.0])[0] / (trajectories.timesteps[step].item() or 1.0)
    if ratio <= 0:  # it read nothing, or there is no time but 0 to tell by
        raise _no_embedding(denoiser)
    return 10.0 ** round(math.log10(ratio))  # Flux multiplies by 1000, in bfloat16 less exactly


def _parts(denoiser: nn.Module) -> tuple[nn.Module, TimestepEmbedding]:
    """Return the sinusoid of the timestep that stands beside a perceptron, and that.

    Of several, such as one for the text alone, it is the one that is least deep in the denoiser.
    """
    modules = sorted(denoiser.named_modules(), key=lambda named: named[0].count("."))
    for _, module in modules:
        parts = list(module.children())
        projection = next((part for part in parts if isinstance(part, PROJECTIONS)), None)
        embedding = next((part for part in parts if isinstance(part, TimestepEmbedding)), None)
        if projection is not None and embedding is not None:
            return projection, embedding
    raise _no_embedding(denoiser)


def _no_embedding(denoiser: nn.Module) -> InputError:
    """Return what to say of a denoiser that has none, or one of another kind."""
    return InputError(
        f"routing must be learned or segments: {type(denoiser).__name__} has no embedding of the "
        "timestep that a router could read"
    )


def _plain(layer: nn.Linear) -> nn.Linear:
    """Return a plain copy of a layer, which may be an open one with a branch."""
    rows, columns = layer.weight.shape
    plain = nn.Linear(columns, rows, layer.bias is not None, "meta")  # takes no random numbers
    weight = layer.weight.detach().clone()
    down, up = (getattr(layer, name, None) for name in ("branch_down", "branch_up"))
    if down is not None and up is not None:
        weight += up.detach() @ down.detach()
    plain.weight = nn.Parameter(weight)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain
