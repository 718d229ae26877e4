import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from msfp import InputError
from msfp.evaluation.dataset_statistics import DatasetStatistics, dataset_statistics
from msfp.evaluation.features import pixels
from msfp.evaluation.frechet import FeatureMoments, frechet_distance
from msfp.evaluation.whole_sets import FrechetDistance
from msfp.support.image_files import image_files, read_image


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
    told = []
    found = dataset_statistics(
        folder, pixels, name="pixels", size=16, progress=lambda *stage: told.append(stage)
    )
    images = torch.stack([read_image(file, 16) for file in image_files(folder)])
    assert told == [("images", 0, 6), ("images", 6, 6)]
    others = torch.rand(9, 3, 16, 16)
    expected = FrechetDistance(pixels, images)(others)
    of_others = reference_of(others)
    assert frechet_distance(of_others, found.statistics) == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def each_batch_is_saved(monkeypatch):
    monkeypatch.setattr("msfp.support.autosave.SAVE_SECONDS", 0)
    monkeypatch.setattr("msfp.support.autosave.SAVE_SHARE", math.inf)
    monkeypatch.setattr("msfp.support.image_files.READ_AT_ONCE", 4)


def stopped_after(images):
    def features(given):
        stopped_after.given += len(given)
        if stopped_after.given > images:
            raise KeyboardInterrupt
        return pixels(given)

    stopped_after.given = -2  # for the probe
    return features


@pytest.mark.usefixtures("each_batch_is_saved")
def test_statistics_that_were_stopped_resume_to_the_same_bits(tmp_path):
    folder, state, told = folder_of(tmp_path, count=11), tmp_path / "s.safetensors", []
    settings = {"name": "pixels", "size": 16}
    whole = dataset_statistics(folder, pixels, **settings)
    for images in (6, 5):
        with pytest.raises(KeyboardInterrupt):
            dataset_statistics(folder, stopped_after(images), **settings, state=state)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["images", "s.safetensors"]
    found = dataset_statistics(
        folder, pixels, **settings, state=state, progress=lambda *stage: told.append(stage)
    )
    assert told == [("images", 8, 11), ("images", 11, 11)]
    assert torch.equal(found.statistics.mean, whole.statistics.mean)
    assert torch.equal(found.statistics.covariance, whole.statistics.covariance)
    assert found.description() == whole.description()
    again = dataset_statistics(folder, pixels, **settings, state=state)
    assert torch.equal(again.statistics.covariance, whole.statistics.covariance)


OTHER_RUNS = {
    "size": ({"size": 8}, "its size is 16, not 8"),
    "filter": ({"resize": "lanczos"}, "its resize is bicubic, not lanczos"),
    "network": (
        {"network": lambda images: pixels(images) + 1},
        "its values of features differ",
    ),
    "images": ({}, "its images is 6 images .*, not 7 images "),
}


@pytest.mark.usefixtures("each_batch_is_saved")
@pytest.mark.parametrize("case", OTHER_RUNS)
def test_the_state_of_other_statistics_is_refused(tmp_path, case):
    folder, state = folder_of(tmp_path), tmp_path / "s.safetensors"
    settings = {"network": pixels, "name": "pixels", "size": 16, "state": state}
    dataset_statistics(folder, **settings)
    before, (change, message) = state.read_bytes(), OTHER_RUNS[case]
    if case == "images":
        (folder / "another.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(InputError, match=message):
        dataset_statistics(folder, **settings | change)
    assert state.read_bytes() == before


def test_a_file_holds_all_that_there_is_to_know(tmp_path):
    found = dataset_statistics(folder_of(tmp_path), pixels, name="pixels", size=16)
    found.save(tmp_path / "a.safetensors")
    again = DatasetStatistics.load(tmp_path / "a.safetensors")
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
    found = dataset_statistics(folder_of(tmp_path), pixels, name="pixels", size=16)
    found.check_features(pixels)
    for other in (lambda images: pixels(images * 2), lambda images: pixels(images)[:, :9]):
        with pytest.raises(InputError, match="must be those of the reference, pixels"):
            found.check_features(other)


def test_files_of_something_else_are_refused(tmp_path):
    (tmp_path / "text").write_text("none")
    save_file({"mean": torch.zeros(1)}, tmp_path / "other.safetensors")
    unreadable, other = "cannot be read as statistics of a", "must be statistics of a data set, but"
    for name, message in (
        ("text", unreadable), ("other.safetensors", other), ("absent", unreadable)
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            DatasetStatistics.load(tmp_path / name)
