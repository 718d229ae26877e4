"""How far a quantized denoiser is from the full-precision one."""

from __future__ import annotations

import torch
from torch import nn
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from msfp.errors import InputError
from msfp.features import Features
from msfp.trajectories import Trajectories

FEATURE_BATCH = 64
"""Images that the features are computed of at a time."""


@torch.no_grad()
def noise_errors(denoiser: nn.Module, trajectories: Trajectories) -> list[float]:
    """Return the mean squared error of the prediction at each timestep of held-out trajectories.

    The noise has unit variance, so an error of 0.01 is one hundredth of it.
    """
    rows = torch.arange(trajectories.samples.shape[1])
    return [
        (trajectories.predict(denoiser, torch.full_like(rows, step), rows) - prediction)
        .square()
        .mean()
        .item()
        for step, prediction in enumerate(trajectories.predictions)
    ]


def paired_psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [0, 1] against their pairs.

    The squared error is averaged over all images before the logarithm.

    Example:
        >>> round(paired_psnr(torch.full((2, 1, 4, 4), 0.1), torch.zeros(2, 1, 4, 4)), 3)
        20.0
    """
    return float(peak_signal_noise_ratio(images.double(), reference.double(), data_range=1.0))


def paired_sqnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the energy of reference images over that of their pairs' errors, in dB.

    Example:
        >>> round(paired_sqnr(torch.full((2, 1, 4, 4), 0.9), torch.ones(2, 1, 4, 4)), 3)
        20.0
    """
    noise = (images.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def paired_ssim(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean structural similarity of images in [0, 1] and their pairs.

    That of Wang, Bovik, Sheikh and Simoncelli (2004), with Gaussian windows of 11 pixels; 1 for
    equal images.

    Example:
        >>> images = torch.rand(2, 1, 16, 16)
        >>> round(paired_ssim(images, images), 3)
        1.0
    """
    similarity = structural_similarity_index_measure(
        images.double(), reference.double(), data_range=1.0
    )
    return float(similarity)  # type: ignore[arg-type]


class _Network(nn.Module):
    """Features as torchmetrics wants them."""

    def __init__(self, features: Features, count: int) -> None:
        super().__init__()
        self.features, self.num_features = features, count

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images)


class FrechetDistance:
    """Distance between sets of images in chosen features (Heusel et al., NeurIPS 2017).

    Args:
        features: Maps images in [0, 1] to features of shape (n, any).
        real: The images to compare with, in [0, 1], at least two.

    Raises:
        InputError: If what the features give has another shape.

    Example:
        >>> from msfp.features import pixels
        >>> images = torch.rand(40, 1, 8, 8)
        >>> distance = FrechetDistance(pixels, images)
        >>> distance(images) < 1e-3 < distance(images / 2)
        True
    """

    @torch.no_grad()
    def __init__(self, features: Features, real: torch.Tensor) -> None:
        given = features(real[:2])
        if given.dim() != 2 or len(given) != 2:
            raise InputError(
                f"features must have shape (images, any), not {tuple(given.shape)} for 2 images"
            )
        self._metric = FrechetInceptionDistance(
            feature=_Network(features, given.shape[1]), reset_real_features=False, normalize=True
        )
        self._update(real, real=True)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> float:
        """Return the distance of images in [0, 1] from the real ones."""
        self._metric.reset()
        self._update(images, real=False)
        return float(self._metric.compute())

    def _update(self, images: torch.Tensor, *, real: bool) -> None:
        for some in images.split(FEATURE_BATCH):
            self._metric.update(some, real=real)
