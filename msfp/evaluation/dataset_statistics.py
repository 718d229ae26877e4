"""Statistics of a data set's images in a file, as a reference for Frechet distances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from msfp.errors import InputError
from msfp.evaluation.features import Features, checked_features
from msfp.evaluation.frechet import FeatureMoments, FeatureStatistics
from msfp.support.autosave import Autosave, run_as_fingerprint
from msfp.support.checks import check_callable, check_choice, check_path, check_whole
from msfp.support.container import FileKind, Header, read, write
from msfp.support.image_files import Resize, image_files, listed, read_batches
from msfp.support.progress import Progress, counted, shown_progress
from msfp.version import __version__


def _without_version(header: Header) -> Header:
    """Convert the header of version 1 statistics, which stored the version among the facts."""
    return Header({}, {key: value for key, value in header.facts.items() if key != "version"})


KIND = FileKind(
    "statistics of a data set", first_key="msfp_statistics", migrations={1: _without_version}
)
STATE = FileKind(
    "a state of msfp statistics",
    first_key="a state of msfp statistics",
    migrations={1: run_as_fingerprint},
)
TOLERANCE = 1e-2
"""Largest relative difference between features of one image on different devices."""


@dataclass(frozen=True)
class DatasetStatistics:
    """Statistics of the images of a folder, and how they were computed.

    Attributes:
        statistics: Mean and covariance of the features.
        features: Name of the feature network.
        size: Height and width of the network's input images.
        resize: The filter that resized images to that size.
        probe: The network's features of `probe_images(size)`, which identify the network.
    """

    statistics: FeatureStatistics
    features: str
    size: int
    resize: Resize
    probe: torch.Tensor

    def check_features(self, network: Features) -> None:
        """Raise InputError unless the statistics were computed with this network."""
        given = checked_features(network, probe_images(self.size)).float()
        if not same_features(given, self.probe):
            raise InputError(
                f"features must be those of the reference, {self.features}: they differ for the "
                "same image"
            )

    def description(self) -> dict[str, Any]:
        """Return how the statistics were computed, as plain JSON types."""
        return {
            "features": self.features,
            "count": self.statistics.count,
            "size": self.size,
            "resize": self.resize,
            "preprocessing": "RGB, central square, resized by Pillow in float32 with "
            "antialiasing and without rounding to 8 bits, divided by 255",
            "msfp": __version__,
        }

    def save(self, file: Path) -> None:
        """Write a .safetensors file.

        Raises:
            InputError: If the file cannot be written.
        """
        tensors = {
            "mean": self.statistics.mean,
            "covariance": self.statistics.covariance,
            "probe": self.probe,
        }
        write(file, KIND, tensors, self.description())

    @classmethod
    def load(cls, file: Path) -> DatasetStatistics:
        """Read a file that `save` wrote.

        Raises:
            InputError: If the file does not hold statistics of a data set.
        """
        (_, told), tensors = read(file, KIND)
        try:
            statistics = FeatureStatistics(tensors["mean"], tensors["covariance"], told["count"])
            return cls(statistics, told["features"], told["size"], told["resize"], tensors["probe"])
        except (LookupError, TypeError) as error:
            raise InputError(f"{file} cannot be read as {KIND.name}: {error}") from error


def same_features(given: torch.Tensor, known: torch.Tensor) -> bool:
    """Return whether two sets of features of the same images are from the same network."""
    return given.shape == known.shape and bool((given - known).norm() <= TOLERANCE * known.norm())


def probe_images(size: int) -> torch.Tensor:
    """Return two images that never change, shape (2, 3, size, size), float32 in [0, 1]."""
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def dataset_statistics(
    folder: str | Path,
    network: Features,
    *,
    name: str,
    size: int,
    resize: Resize = "bicubic",
    state: str | Path | None = None,
    progress: Progress = shown_progress,
) -> DatasetStatistics:
    """Return the statistics of all images of a folder.

    Args:
        folder: A folder with images, searched with its subfolders. Files are read in the order of
            their paths.
        network: Maps images in [0, 1] to features.
        name: Name of the network.
        size: Height and width to which the central square of each image is resized.
        resize: The resize filter of Pillow.
        state: A safetensors file to resume from if it exists. It is saved every minute, or less
            often if saving takes long. On a CPU, statistics that resume have the same bits as
            those of an uninterrupted run.
        progress: Called after each batch, and once for the images in the state.

    Raises:
        InputError: If there are fewer than two images, an image cannot be read, the network does
            not accept the images, or the state is of other images, of another network or size, or
            cannot be written.
    """
    check_callable("network", network)
    check_whole("size", size, 1)
    check_choice("resize", resize, get_args(Resize))
    folder = check_path("folder", folder)
    files = image_files(folder)
    probe = checked_features(network, probe_images(size)).float().contiguous()
    moments, saved = FeatureMoments(), None
    if state is not None:
        run = {"size": size, "resize": resize, "values of features": probe.flatten().tolist()}
        saved = Autosave(check_path("state", state), STATE, run | {"images": listed(folder)})
        saved.restore(moments)
    done = counted(progress, "images", len(files))
    done(moments.count)
    for images in read_batches(files[moments.count :], size, resize):
        moments.update(checked_features(network, images))
        if saved is not None:
            saved.save(moments)
        done(len(images))
    return DatasetStatistics(moments.statistics(), name, size, resize, probe)
