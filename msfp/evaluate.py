"""How far a quantized denoiser is from the full-precision one."""

from __future__ import annotations

import torch
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance

from msfp.trajectories import Trajectories


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


class _Features(nn.Module):
    """A feature network as torchmetrics wants it: called on images, gives (n, features)."""

    def __init__(self, classifier: nn.Module, features: int) -> None:
        super().__init__()
        self.classifier, self.num_features = classifier, features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.classifier.features(images * 2 - 1)  # type: ignore[operator]
        return features


class FrechetDistance:
    """Distance between sets of images in the features of a classifier (Heusel et al., 2017).

    Args:
        classifier: A network whose `features` method maps images in [-1, 1] to `num_features`
            numbers each.
        real: The real images, in [0, 1].
    """

    def __init__(self, classifier: nn.Module, real: torch.Tensor) -> None:
        features = _Features(classifier, int(classifier.num_features))  # type: ignore[arg-type]
        self._metric = FrechetInceptionDistance(
            feature=features, reset_real_features=False, normalize=True
        )
        self._metric.update(real, real=True)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> float:
        """Return the distance of images in [0, 1] from the real ones."""
        self._metric.reset()
        self._metric.update(images, real=False)
        return float(self._metric.compute())
