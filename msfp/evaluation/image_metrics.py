"""All metrics of two pipelines' images, updated batch by batch, and some of the images."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from msfp.errors import InputError
from msfp.evaluation.dataset_statistics import same_features
from msfp.evaluation.metrics import METRICS, ImageSets, Measure, Setting, features_of
from msfp.support.container import part

KEPT_IMAGES = 64
PROBES = 2
"""Number of images whose features identify a network."""


class ImageMetrics:
    """Measures the images of both pipelines batch by batch.

    Attributes:
        count: Number of images in each set measured so far.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.count = 0
        self._metrics = [metric(setting) for metric in METRICS]
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, sets: ImageSets) -> None:
        """Add a batch."""
        for metric in self._metrics:
            metric.update(sets)
        left = KEPT_IMAGES - sum(len(some) for some, _ in self._kept)
        if left > 0:
            self._kept.append((sets.full[:left], sets.quantized[:left]))
        self.count += len(sets.full)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that `restore` needs to resume with the batches after these."""
        full, quantized = self.images
        named = {"full": full, "quantized": quantized, "probe": self._probe(full)}
        for metric in self._metrics:
            named |= {f"{metric.name}/{key}": each for key, each in metric.state().items()}
        return named | {"count": torch.tensor(self.count)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the state from the result of `tensors`; a batch must follow before `measures`.

        Raises:
            InputError: If the state is of other features.
        """
        # Images may contain NaN. Their features are then NaN too.
        probes = (self._probe(tensors["full"]), tensors["probe"])
        if not same_features(*(probe.nan_to_num() for probe in probes)):
            raise InputError("features must be those of the state: they differ for the same image")
        self._kept = [(tensors["full"], tensors["quantized"])]
        for metric in self._metrics:
            metric.restore(part(metric.name, tensors))
        self.count = int(tensors["count"])

    def _probe(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of some images."""
        return features_of(images[:PROBES], self.setting).float().contiguous()

    @property
    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Some images of the full-precision pipeline, and those of the quantized one."""
        full, quantized = (torch.cat(sets) for sets in zip(*self._kept, strict=True))
        return full, quantized

    def measures(self) -> list[Measure]:
        """Return the results of all metrics."""
        return [each for metric in self._metrics for each in metric.result(self.count)]
