"""The metrics of images: one class for each metric, and the list of all metrics.

A metric takes image sets batch by batch, and returns its measures at the end. Evaluations, tables,
pages and saved states read the list `METRICS`. To add a metric, add a class here and an entry to
the list.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from msfp.errors import InputError
from msfp.evaluation.dataset_statistics import DatasetStatistics
from msfp.evaluation.features import Features, checked_features
from msfp.evaluation.frechet import FeatureMoments, FeatureStatistics, frechet_distance
from msfp.support.container import part
from msfp.support.decibels import sqnr
from msfp.support.image_files import eight_bits

SSIM_WINDOW = 11
"""Width of the window of the structural similarity, in pixels."""


class ImageSets(NamedTuple):
    """Images in [0, 1], three tensors of shape (n, channels, height, width).

    Attributes:
        quantized: Images of the quantized pipeline.
        full: Images of the full-precision pipeline, from the same noise.
        other: Images of the full-precision pipeline, from other noise.
    """

    quantized: torch.Tensor
    full: torch.Tensor
    other: torch.Tensor


class Measure(NamedTuple):
    """A number that was measured.

    Attributes:
        key: Its name in JSON.
        label: Its name in tables.
        value: The number, or NaN if there is none.
        text: The number as tables show it.
        note: The data that it was measured on.
    """

    key: str
    label: str
    value: float
    text: str
    note: str


class Setting(NamedTuple):
    """The settings of all metrics.

    Attributes:
        features: The features with which image sets are compared.
        features_name: The name of the features in tables.
        statistics: Statistics of a data set to compare with, or None.
    """

    features: Features
    features_name: str
    statistics: DatasetStatistics | None


class Metric(ABC):
    """A metric of image sets, updated batch by batch.

    Attributes:
        name: Name of the metric in saved states.
    """

    name: ClassVar[str]

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def update(self, sets: ImageSets) -> None:
        """Add a batch."""

    @abstractmethod
    def result(self, count: int) -> list[Measure]:
        """Return the measures, given the number of images in each set."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Return all that `restore` needs to resume with the batches after these."""

    @abstractmethod
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the result of `state`; a batch must follow before `result`."""


def _of_pairs(count: int) -> str:
    return f"{count} images of each model from equal noise"


class Psnr(Metric):
    """Peak signal-to-noise ratio of pairs; the squared error is averaged over all pairs."""

    name = "psnr"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._metric = PeakSignalNoiseRatio(data_range=1.0).set_dtype(torch.float64)
        self._metric.persistent(True)

    def update(self, sets: ImageSets) -> None:
        """Add a batch."""
        self._metric.update(sets.quantized.double(), sets.full.double())

    def result(self, count: int) -> list[Measure]:
        """Return the ratio in dB."""
        value = float(self._metric.compute())
        return [Measure("psnr", "paired PSNR, dB", value, f"{value:.2f}", _of_pairs(count))]

    def state(self) -> dict[str, torch.Tensor]:
        """Return the running sums."""
        return self._metric.state_dict()

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the running sums."""
        self._metric.load_state_dict(state)


class Ssim(Metric):
    """Mean structural similarity of pairs, or NaN if images are smaller than its window.

    The definition is that of Wang, Bovik, Sheikh and Simoncelli (2004), with Gaussian windows of 11
    pixels.
    """

    name = "ssim"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._metric = StructuralSimilarityIndexMeasure(data_range=1.0).set_dtype(torch.float64)
        self._metric.persistent(True)
        self._fits = True

    def update(self, sets: ImageSets) -> None:
        """Add a batch."""
        self._fits = min(sets.full.shape[2:]) >= SSIM_WINDOW
        if self._fits:
            self._metric.update(sets.quantized.double(), sets.full.double())

    def result(self, count: int) -> list[Measure]:
        """Return the mean similarity, 1 for equal images."""
        value = float(self._metric.compute()) if self._fits else math.nan
        note = _of_pairs(count) if self._fits else f"images are under {SSIM_WINDOW} pixels"
        return [Measure("ssim", "paired SSIM", value, f"{value:.4f}", note)]

    def state(self) -> dict[str, torch.Tensor]:
        """Return the running sums."""
        return self._metric.state_dict()

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the running sums."""
        self._metric.load_state_dict(state)


class Sqnr(Metric):
    """Energy of the full-precision images over that of the errors of the quantized ones."""

    name = "sqnr"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._energy = self._noise = 0.0

    def update(self, sets: ImageSets) -> None:
        """Add a batch."""
        images, reference = sets.quantized.double(), sets.full.double()
        self._energy += reference.square().sum().item()
        self._noise += (images - reference).square().sum().item()

    def result(self, count: int) -> list[Measure]:
        """Return the ratio in dB."""
        value = sqnr(self._energy, self._noise)
        return [Measure("sqnr", "paired SQNR, dB", value, f"{value:.2f}", _of_pairs(count))]

    def state(self) -> dict[str, torch.Tensor]:
        """Return the running sums."""
        return {"sums": torch.tensor([self._energy, self._noise], dtype=torch.float64)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the running sums."""
        self._energy, self._noise = state["sums"].tolist()


class Frechet(Metric):
    """Frechet distances (Heusel et al., NeurIPS 2017) of images rounded to 8 bits, as in files."""

    name = "frechet"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._moments = [FeatureMoments() for _ in ImageSets._fields]

    def update(self, sets: ImageSets) -> None:
        """Add a batch."""
        for moments, images in zip(self._moments, sets, strict=True):
            moments.update(features_of(images, self.setting))

    def result(self, count: int) -> list[Measure]:
        """Return the distances from full-precision images, and from images of a data set."""
        quantized, full, other = (moments.statistics() for moments in self._moments)
        apart, floor = frechet_distance(quantized, other), frechet_distance(full, other)
        note = f"{count} images, from {count} full-precision ones of another seed"
        label = f"Frechet distance ({self.setting.features_name})"
        return [
            _distance("frechet", label, apart, note),
            _distance(
                "frechet_floor",
                "its noise floor",
                floor,
                "the same, with the full-precision images of equal seeds",
            ),
            *self._from_data_set(count, quantized, full, other),
        ]

    def _from_data_set(self, count: int, *sets: FeatureStatistics) -> list[Measure]:
        """Return the distances of the three sets from a data set, if there is one."""
        if self.setting.statistics is None:
            return []
        real = self.setting.statistics.statistics
        quantized, full, other = (frechet_distance(each, real) for each in sets)
        of = f"{count} images, from {real.count} of the data set"
        noise = "its difference from the line above is noise"
        return [
            _distance("data_set", "Frechet distance from the data set", quantized, of),
            _distance("data_set_full", "the same in full precision", full, "from equal noise"),
            _distance("data_set_other", "and of another seed", other, noise),
        ]

    def state(self) -> dict[str, torch.Tensor]:
        """Return the running sums of the three sets, by the index of the set."""
        return {
            f"{index}/{name}": tensor
            for index, moments in enumerate(self._moments)
            for name, tensor in moments.tensors().items()
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the running sums of the three sets."""
        for index, moments in enumerate(self._moments):
            moments.restore(part(str(index), state))


def _distance(key: str, label: str, value: float, note: str) -> Measure:
    return Measure(key, label, value, f"{value:.4g}", note)


METRICS: tuple[type[Metric], ...] = (Psnr, Ssim, Sqnr, Frechet)
"""The metrics of an evaluation, in the order of its tables."""


def features_of(images: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Return the features of images, rounded to 8 bits as in a file.

    With statistics of a data set, images of one channel are converted to RGB.

    Raises:
        InputError: If the data set's images are of another size.
    """
    if setting.statistics is None:
        return checked_features(setting.features, eight_bits(images))
    size = setting.statistics.size
    if images.shape[2:] != (size, size):
        height, width = images.shape[2:]
        raise InputError(
            f"statistics must be of images as large as the model's, {height}x{width}, not "
            f"{size}x{size}"
        )
    return checked_features(setting.features, eight_bits(images).expand(-1, 3, -1, -1))
