"""Mean and covariance of the features of image sets, and the Frechet distance between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from msfp.errors import InputError


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of the features of an image set, for the Frechet distance.

    Attributes:
        mean: Mean of the features, shape (features,), float64.
        covariance: Unbiased covariance of the features, shape (features, features), float64.
        count: Number of images, at least two.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int


class FeatureMoments:
    """Running sums over the features of images, updated batch by batch.

    Example:
        >>> from msfp.evaluation.features import pixels
        >>> moments = FeatureMoments()
        >>> for _ in range(3):
        ...     moments.update(pixels(torch.rand(4, 3, 16, 16)))
        >>> moments.statistics().count
        12
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum = torch.zeros(1, dtype=torch.float64)
        self._products = torch.zeros(1, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        """Add the features of some images, shape (images, features)."""
        features = features.double().cpu()
        self.count += len(features)
        self._sum = self._sum + features.sum(dim=0)
        self._products = self._products + features.T @ features

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that `restore` needs to resume with the images after these."""
        count = torch.tensor(self.count)
        return {"count": count, "sum": self._sum, "products": self._products}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the sums from the result of `tensors`."""
        self.count = int(tensors["count"])
        self._sum, self._products = tensors["sum"], tensors["products"]

    def statistics(self) -> FeatureStatistics:
        """Return the mean and covariance of the features added so far.

        Raises:
            InputError: If there are fewer than two images.
        """
        if self.count < 2:
            raise InputError(f"count must be at least 2 for a covariance, not {self.count}")
        mean = self._sum / self.count
        covariance = (self._products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return FeatureStatistics(mean, covariance, self.count)


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """Return the Frechet distance of two normal distributions (Heusel et al., NeurIPS 2017).

    The distance is (m1 - m2)^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The symmetric root
    (C1^(1/2) C2 C1^(1/2))^(1/2) has the same trace, and is real for singular covariances too.

    Raises:
        InputError: If the numbers of features differ.

    Example:
        >>> unit = FeatureStatistics(torch.zeros(2).double(), torch.eye(2).double(), 10)
        >>> wide = FeatureStatistics(torch.ones(2).double(), 4 * torch.eye(2).double(), 10)
        >>> round(frechet_distance(unit, wide), 6)  # 2 from the means, and 2 * (2 - 1)^2
        4.0
    """
    if one.mean.shape != other.mean.shape:
        raise InputError(
            f"statistics must have the same number of features, not {len(one.mean)} and "
            f"{len(other.mean)}"
        )
    root = _root(one.covariance)
    product = torch.linalg.eigvalsh(root @ other.covariance @ root)
    apart = (one.mean - other.mean).square().sum()
    spread = one.covariance.trace() + other.covariance.trace()
    return float(apart + spread - 2 * product.clamp(min=0).sqrt().sum())


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """Return the symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    root: torch.Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root
