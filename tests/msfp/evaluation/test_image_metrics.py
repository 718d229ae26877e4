import pytest
import torch

from msfp import InputError
from msfp.evaluation import image_metrics
from msfp.evaluation.features import pixels
from msfp.evaluation.fingerprint import STATE
from msfp.evaluation.image_metrics import KEPT_IMAGES, ImageMetrics
from msfp.evaluation.metrics import METRICS, ImageSets, Measure, Metric, Setting
from msfp.support.container import read, write

SETTING = Setting(pixels, "pixels", None)


def test_features_that_are_not_numbers_can_be_resumed_with(tmp_path):
    file = tmp_path / "e.safetensors"
    setting = SETTING._replace(features=lambda images: pixels(images) + float("nan"))
    one, other = ImageMetrics(setting), ImageMetrics(setting)
    images = torch.rand(4, 1, 16, 16)
    one.update(ImageSets(images, images, images))
    write(file, STATE, one.tensors(), {})
    other.restore(read(file, STATE)[1])
    assert other.count == 4


def test_no_more_images_are_kept_than_are_shown():
    metrics = ImageMetrics(SETTING)
    for _ in range(2):
        images = torch.rand(50, 1, 16, 16)
        metrics.update(ImageSets(images, images, images))
    kept = metrics.tensors()
    assert len(kept["full"]) == len(kept["quantized"]) == KEPT_IMAGES
    assert metrics.count == 100


def test_a_metric_more_in_the_list_is_measured_saved_and_restored(monkeypatch):
    class Brightness(Metric):
        name = "brightness"
        total = 0.0

        def update(self, sets):
            self.total += sets.quantized.double().sum().item()

        def result(self, count):
            return [Measure("brightness", "sum of pixels", self.total, "", f"{count} images")]

        def state(self):
            return {"total": torch.tensor(self.total, dtype=torch.float64)}

        def restore(self, state):
            self.total = state["total"].item()

    monkeypatch.setattr(image_metrics, "METRICS", (*METRICS, Brightness))
    one, other = ImageMetrics(SETTING), ImageMetrics(SETTING)
    images = torch.rand(4, 1, 16, 16)
    one.update(ImageSets(images, images / 2, images / 4))
    assert "brightness/total" in one.tensors()
    other.restore(one.tensors())
    for metrics in (one, other):
        metrics.update(ImageSets(images, images / 2, images / 4))
        last = metrics.measures()[-1]
        assert last.value == pytest.approx(2 * images.sum().item())
        assert last.note == "8 images"
    assert other.measures()[:-1] == one.measures()[:-1]


def test_a_state_of_other_features_is_refused():
    one = ImageMetrics(SETTING)
    images = torch.rand(4, 1, 16, 16)
    one.update(ImageSets(images, images, images))
    other = ImageMetrics(SETTING._replace(features=lambda images: pixels(images) + 1))
    with pytest.raises(InputError, match="features must be those of the state"):
        other.restore(one.tensors())
    assert other.count == 0
