"""Metrics of image sets that are entirely in memory."""

from __future__ import annotations

import torch
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from msfp.evaluation.features import Features, checked_features
from msfp.evaluation.frechet import FeatureMoments, FeatureStatistics, frechet_distance


def paired_psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [0, 1] against their pairs.

    The squared error is averaged over all images before the logarithm.

    Example:
        >>> round(paired_psnr(torch.full((2, 1, 4, 4), 0.1), torch.zeros(2, 1, 4, 4)), 3)
        20.0
    """
    return float(peak_signal_noise_ratio(images.double(), reference.double(), data_range=1.0))


def paired_sqnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the energy of reference images over that of the errors of their pairs, in dB.

    Example:
        >>> round(paired_sqnr(torch.full((2, 1, 4, 4), 0.9), torch.ones(2, 1, 4, 4)), 3)
        20.0
    """
    noise = (images.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def paired_ssim(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the mean structural similarity of images in [0, 1] and their pairs.

    The definition is that of Wang, Bovik, Sheikh and Simoncelli (2004), with Gaussian windows of 11
    pixels. The result is 1 for equal images.

    Example:
        >>> images = torch.rand(2, 1, 16, 16)
        >>> round(paired_ssim(images, images), 3)
        1.0
    """
    similarity = structural_similarity_index_measure(
        images.double(), reference.double(), data_range=1.0
    )
    return float(similarity)  # type: ignore[arg-type]


class FrechetDistance:
    """Frechet distance between image sets in chosen features (Heusel et al., NeurIPS 2017).

    Args:
        features: Maps images in [0, 1] to features of shape (n, any).
        real: The images to compare with, in [0, 1], at least two.

    Raises:
        InputError: If the features have another shape.

    Example:
        >>> from msfp.evaluation.features import pixels
        >>> images = torch.rand(40, 1, 8, 8)
        >>> distance = FrechetDistance(pixels, images)
        >>> distance(images) < 1e-3 < distance(images / 2)
        True
    """

    def __init__(self, features: Features, real: torch.Tensor) -> None:
        self._features, self._real = features, _statistics(features, real)

    def __call__(self, images: torch.Tensor) -> float:
        """Return the distance of images in [0, 1] from the real ones."""
        return frechet_distance(_statistics(self._features, images), self._real)


def _statistics(features: Features, images: torch.Tensor) -> FeatureStatistics:
    """Return the statistics of the features of images."""
    moments = FeatureMoments()
    moments.update(checked_features(features, images))
    return moments.statistics()
