import math

import pytest
import torch

from msfp import DatasetStatistics, InputError
from msfp.evaluation.dataset_statistics import probe_images
from msfp.evaluation.features import pixels
from msfp.evaluation.frechet import FeatureMoments, frechet_distance
from msfp.evaluation.image_metrics import ImageMetrics
from msfp.evaluation.metrics import METRICS, ImageSets, Setting
from msfp.evaluation.whole_sets import FrechetDistance, paired_psnr, paired_sqnr, paired_ssim
from msfp.support.image_files import eight_bits

SIZE = 16


@pytest.fixture
def setting():
    """With statistics of a data set, so that all measures are there."""
    moments = FeatureMoments()
    moments.update(pixels(torch.rand(9, 3, SIZE, SIZE)))
    probe = pixels(probe_images(SIZE))
    statistics = DatasetStatistics(moments.statistics(), "pixels", SIZE, "bicubic", probe)
    return Setting(pixels, "coarse pixels", statistics)


def images(count, size=SIZE):
    return ImageSets(*(torch.rand(count, 3, size, size) for _ in ImageSets._fields))


def measured(metric, count):
    return {measure.key: measure for measure in metric.result(count)}


def test_names_of_metrics_and_keys_of_measures_are_unique(setting):
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    metrics = ImageMetrics(setting)
    metrics.update(images(4))
    keys = [measure.key for measure in metrics.measures()]
    assert len(set(keys)) == len(keys)
    assert keys == [
        "psnr", "ssim", "sqnr", "frechet", "frechet_floor",
        "data_set", "data_set_full", "data_set_other",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_that_is_restored_has_the_same_result(kind, setting):
    first, second = images(3), images(4)
    whole, stopped, resumed = kind(setting), kind(setting), kind(setting)
    stopped.update(first)
    state = stopped.state()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    resumed.restore({name: tensor.clone() for name, tensor in state.items()})
    resumed.update(second)
    for batch in (first, second):
        whole.update(batch)
    assert measured(resumed, 7) == measured(whole, 7)
    assert all(math.isfinite(each.value) for each in whole.result(7))
    other = kind(setting)
    other.update(second)
    assert [each.value for each in other.result(4)] != [each.value for each in whole.result(7)]


def test_measures_of_batches_are_those_of_all_images_together(setting):
    batches = [images(3), images(4)]
    metrics = ImageMetrics(setting._replace(statistics=None))
    for batch in batches:
        metrics.update(batch)
    quantized, full, other = (torch.cat(sets) for sets in zip(*batches, strict=True))
    values = {measure.key: measure.value for measure in metrics.measures()}
    distance = FrechetDistance(pixels, eight_bits(other))
    expected = {
        "psnr": paired_psnr(quantized, full),
        "ssim": paired_ssim(quantized, full),
        "sqnr": paired_sqnr(quantized, full),
        "frechet": distance(eight_bits(quantized)),
        "frechet_floor": distance(eight_bits(full)),
    }
    assert values == pytest.approx(expected, rel=1e-9)


def test_distances_from_a_data_set_are_those_of_the_three_sets(setting):
    batch = images(6)
    metrics = ImageMetrics(setting)
    metrics.update(batch)
    values = {measure.key: measure.value for measure in metrics.measures()}
    for key, some in zip(("data_set", "data_set_full", "data_set_other"), batch, strict=True):
        moments = FeatureMoments()
        moments.update(pixels(eight_bits(some)))
        distance = frechet_distance(moments.statistics(), setting.statistics.statistics)
        assert values[key] == pytest.approx(distance, rel=1e-9)


def test_small_images_have_no_structural_similarity_but_all_else(setting):
    metrics = ImageMetrics(setting._replace(statistics=None))
    metrics.update(images(4, size=8))
    found = {measure.key: measure for measure in metrics.measures()}
    assert math.isnan(found.pop("ssim").value)
    assert all(math.isfinite(measure.value) for measure in found.values())


def test_tables_name_the_features_and_images_of_another_size_than_the_data_set_are_refused(setting):
    metrics = ImageMetrics(setting)
    metrics.update(images(4))
    labels = {measure.key: measure.label for measure in metrics.measures()}
    assert labels["frechet"] == "Frechet distance (coarse pixels)"
    with pytest.raises(InputError, match="as large as the model's, 8x8, not 16x16"):
        ImageMetrics(setting).update(images(4, size=8))
