"""What is measured of the images of two pipelines, which come in batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from msfp.errors import InputError
from msfp.evaluation.dataset_statistics import ReferenceStatistics, same_features
from msfp.evaluation.features import Features
from msfp.evaluation.frechet import (
    FeatureMoments,
    FeatureStatistics,
    checked_features,
    frechet_distance,
)
from msfp.evaluation.metrics import PairedMeasures
from msfp.support.image_files import eight_bits
from msfp.support.run_files import part

KEPT_IMAGES = 64
PROBES = 2
"""Images by whose features a network is known again."""


@dataclass(frozen=True)
class ReferenceDistances:
    """Frechet distances from a data set's images.

    Attributes:
        quantized: Of the quantized model's images.
        full: Of the full-precision ones that start from equal noise.
        other: Of full-precision ones of another seed; what it differs from `full` by is noise.
        count: Images of the data set.
        features: Name of the feature network.
        size: Height and width that the data set's images were brought to.
    """

    quantized: float
    full: float
    other: float
    count: int
    features: str
    size: int

    def table(self, count: int) -> list[tuple[str, str, str]]:
        """Return rows as `Comparison.table` does; `count` is that of the images of each set."""
        of = f"{count} images, from {self.count} of the reference"
        return [
            ("Frechet distance from the reference", f"{self.quantized:.4g}", of),
            ("the same in full precision", f"{self.full:.4g}", "from equal noise"),
            (
                "and of another seed",
                f"{self.other:.4g}",
                "what it differs by from the line above is noise",
            ),
        ]


class ImageMeasures:
    """What is measured of the images of both pipelines, which come in batches."""

    def __init__(self, features: Features, reference: ReferenceStatistics | None) -> None:
        self.features, self.reference = features, reference
        self.pairs = PairedMeasures()
        self.moments = FeatureMoments(), FeatureMoments(), FeatureMoments()
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def count(self) -> int:
        """Images of each set that were measured."""
        return self.moments[0].count

    def update(self, *sets: torch.Tensor) -> None:
        """Add images of the quantized pipeline, their pairs, and those of another seed."""
        images, paired, _ = sets
        self.pairs.update(images, paired)
        for moments, each in zip(self.moments, sets, strict=True):
            moments.update(checked_features(self.features, self._as_saved(each)))
        left = KEPT_IMAGES - sum(len(some) for some, _ in self.kept)
        if left > 0:
            self.kept.append((paired[:left], images[:left]))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that `restore` needs to go on with the batches after these."""
        full, quantized = (torch.cat(sets) for sets in zip(*self.kept, strict=True))
        named = {"full": full, "quantized": quantized, "probe": self._probe(full)}
        named |= {f"pairs/{name}": each for name, each in self.pairs.tensors().items()}
        for index, moments in enumerate(self.moments):
            named |= {f"{index}/{name}": each for name, each in moments.tensors().items()}
        return named

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `tensors` gave; a batch must follow before anything is measured.

        Raises:
            InputError: If these are of other features.
        """
        # Images may have NaN, of which features are NaN as well.
        probes = (self._probe(tensors["full"]), tensors["probe"])
        if not same_features(*(probe.nan_to_num() for probe in probes)):
            raise InputError("features must be those of the state: they differ for the same image")
        self.kept = [(tensors["full"], tensors["quantized"])]
        self.pairs.restore(part("pairs", tensors))
        for index, moments in enumerate(self.moments):
            moments.restore(part(str(index), tensors))

    def _probe(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of some images."""
        return checked_features(self.features, self._as_saved(images[:PROBES])).float().contiguous()

    def _as_saved(self, images: torch.Tensor) -> torch.Tensor:
        """Return images as they would be read from a file; RGB beside a reference."""
        if self.reference is None:
            return eight_bits(images)
        size = self.reference.size
        if images.shape[2:] != (size, size):
            height, width = images.shape[2:]
            raise InputError(
                f"reference must be of images as large as the model's, {height}x{width}, not "
                f"{size}x{size}"
            )
        return eight_bits(images).expand(-1, 3, -1, -1)

    def found(self) -> dict[str, Any]:
        """Return fields of a `Comparison`."""
        quantized, full, other = (moments.statistics() for moments in self.moments)
        shown = [torch.cat(sets) for sets in zip(*self.kept, strict=True)]
        return {
            "psnr": self.pairs.psnr,
            "ssim": self.pairs.ssim,
            "sqnr": self.pairs.sqnr,
            "frechet": frechet_distance(quantized, other),
            "frechet_floor": frechet_distance(full, other),
            "reference": _from_reference(self.reference, quantized, full, other),
            "images": tuple(shown),
        }


def _from_reference(
    reference: ReferenceStatistics | None, *sets: FeatureStatistics
) -> ReferenceDistances | None:
    """Return the distances of the three sets from a data set, where there is one."""
    if reference is None:
        return None
    real = reference.statistics
    quantized, full, other = (frechet_distance(each, real) for each in sets)
    return ReferenceDistances(
        quantized, full, other, real.count, reference.features, reference.size
    )
