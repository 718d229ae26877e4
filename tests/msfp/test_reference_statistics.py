import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from msfp import InputError
from msfp.evaluate import FrechetDistance
from msfp.feature_statistics import FeatureMoments, frechet_distance
from msfp.features import pixels
from msfp.image_folder import image_files, read_image
from msfp.reference_statistics import ReferenceStatistics, reference_statistics


def folder_of(tmp_path, count=6, side=24):
    (tmp_path / "images").mkdir()
    for number in range(count):
        values = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def reference_of(images):
    moments = FeatureMoments()
    moments.update(pixels(images))
    return moments.statistics()


def test_statistics_of_a_folder_are_those_of_its_images(tmp_path):
    folder = folder_of(tmp_path)
    seen = []
    found = reference_statistics(folder, pixels, name="pixels", size=16, progress=seen.append)
    images = torch.stack([read_image(file, 16) for file in image_files(folder)])
    assert seen == [6]
    others = torch.rand(9, 3, 16, 16)
    expected = FrechetDistance(pixels, images)(others)
    of_others = reference_of(others)
    assert frechet_distance(of_others, found.statistics) == pytest.approx(expected, rel=1e-12)


def test_a_file_holds_all_that_there_is_to_know(tmp_path):
    found = reference_statistics(folder_of(tmp_path), pixels, name="pixels", size=16)
    found.save(tmp_path / "a.safetensors")
    again = ReferenceStatistics.load(tmp_path / "a.safetensors")
    for one, other in (
        (again.statistics.mean, found.statistics.mean),
        (again.statistics.covariance, found.statistics.covariance),
        (again.probe, found.probe),
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert again.description() == found.description()
    assert "without rounding to 8 bits" in found.description()["preprocessing"]


def test_another_network_of_the_same_name_is_refused(tmp_path):
    found = reference_statistics(folder_of(tmp_path), pixels, name="pixels", size=16)
    found.check_features(pixels)
    for other in (lambda images: pixels(images * 2), lambda images: pixels(images)[:, :9]):
        with pytest.raises(InputError, match="must be those of the reference, pixels"):
            found.check_features(other)


def test_files_of_something_else_are_refused(tmp_path):
    (tmp_path / "text").write_text("none")
    save_file({"mean": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other.safetensors", "absent"):
        with pytest.raises(InputError, match="is not a file of msfp statistics"):
            ReferenceStatistics.load(tmp_path / name)
