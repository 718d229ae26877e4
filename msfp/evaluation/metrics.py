"""How far a quantized denoiser is from the full-precision one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from msfp.errors import InputError
from msfp.evaluation.features import Features
from msfp.evaluation.frechet import (
    FeatureMoments,
    FeatureStatistics,
    checked_features,
    frechet_distance,
)
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories
from msfp.search.layer_search import sqnr
from msfp.support.run_files import part

SSIM_WINDOW = 11
"""Pixels that the window of the structural similarity is wide."""


@torch.no_grad()
def noise_errors(
    denoiser: DiffusionPipeline | nn.Module, trajectories: Trajectories, *, batch: int = 64
) -> list[float]:
    """Return the mean squared error of the prediction at each timestep of held-out trajectories.

    The noise has unit variance, so an error of 0.01 is one hundredth of it. What is predicted
    beside it, such as a variance, does not count.

    Args:
        denoiser: Asked what the one that made the trajectories was asked; or a pipeline with it.
        trajectories: All rows of each timestep count.
        batch: The most rows in one forward. The errors depend on it by rounding alone.

    Raises:
        InputError: If `batch` is less than 1, or it is a pipeline without a denoiser.
    """
    denoiser = denoiser_of(denoiser)
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    rows = torch.arange(trajectories.samples.shape[1])

    def error(step: int, some: torch.Tensor) -> float:
        asked = trajectories.predict(denoiser, torch.full_like(some, step), some)
        off = trajectories.of_sample(asked - trajectories.predictions[step, some])
        return off.square().mean().item()

    # Weighted by shares of the rows, so that those of one forward have the weight 1 exactly.
    return [
        sum(len(some) / len(rows) * error(step, some) for some in rows.split(batch))
        for step in range(len(trajectories.timesteps))
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


class PairedMeasures:
    """PSNR, SQNR and SSIM of images in [0, 1] against their pairs, which come in batches.

    Each is what `paired_psnr`, `paired_sqnr` and `paired_ssim` give for all batches together.
    """

    def __init__(self) -> None:
        self._psnr = PeakSignalNoiseRatio(data_range=1.0).set_dtype(torch.float64)
        self._ssim = StructuralSimilarityIndexMeasure(data_range=1.0).set_dtype(torch.float64)
        for metric in (self._psnr, self._ssim):
            metric.persistent(True)
        self._energy = self._noise = 0.0
        self._has_ssim = True

    def update(self, images: torch.Tensor, reference: torch.Tensor) -> None:
        """Add images and their pairs, both of shape (n, channels, height, width)."""
        images, reference = images.double(), reference.double()
        self._psnr.update(images, reference)
        self._energy += reference.square().sum().item()
        self._noise += (images - reference).square().sum().item()
        self._has_ssim = min(images.shape[2:]) >= SSIM_WINDOW
        if self._has_ssim:
            self._ssim.update(images, reference)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that `restore` needs to go on with the batches after these."""
        sums = torch.tensor([self._energy, self._noise], dtype=torch.float64)
        return {
            **{f"psnr/{name}": each for name, each in self._psnr.state_dict().items()},
            **{f"ssim/{name}": each for name, each in self._ssim.state_dict().items()},
            "sqnr/sums": sums,
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `tensors` gave; a batch must follow before anything is measured."""
        self._psnr.load_state_dict(part("psnr", tensors))
        self._ssim.load_state_dict(part("ssim", tensors))
        self._energy, self._noise = tensors["sqnr/sums"].tolist()

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB."""
        return float(self._psnr.compute())

    @property
    def sqnr(self) -> float:
        """Energy of the pairs over that of the errors, in dB."""
        return sqnr(self._energy, self._noise)

    @property
    def ssim(self) -> float:
        """Mean structural similarity, NaN where images are smaller than its window."""
        return float(self._ssim.compute()) if self._has_ssim else math.nan


class FrechetDistance:
    """Distance between sets of images in chosen features (Heusel et al., NeurIPS 2017).

    Args:
        features: Maps images in [0, 1] to features of shape (n, any).
        real: The images to compare with, in [0, 1], at least two.

    Raises:
        InputError: If what the features give has another shape.

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
