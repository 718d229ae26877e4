import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from msfp import InputError
from msfp.evaluation.frechet import FeatureMoments, frechet_distance


def statistics(features, parts=1):
    moments = FeatureMoments()
    for some in features.tensor_split(parts):
        moments.update(some)
    return moments.statistics()


def drawn(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, size, generator=generator) @ torch.randn(
        size, size, generator=generator
    )
    return mixed + torch.randn(size, generator=generator)


class _AsGiven(nn.Module):
    num_features = 12

    def forward(self, features):
        return features


def test_mean_and_covariance_are_those_of_all_batches_together():
    features = drawn(50, 7, 0)
    found = statistics(features, parts=6)
    assert found.count == 50
    assert np.allclose(found.mean, features.double().mean(0), atol=1e-12)
    assert np.allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False))


@pytest.mark.parametrize("count", [200, 5])
def test_the_distance_is_that_of_torchmetrics_and_of_a_matrix_root(count):
    one, other = drawn(count, 12, 1), drawn(count, 12, 2)
    found = frechet_distance(statistics(one), statistics(other))
    metric = FrechetInceptionDistance(feature=_AsGiven(), normalize=True)
    metric.update(one.double(), real=True)
    metric.update(other.double(), real=False)
    assert found == pytest.approx(metric.compute().item(), rel=1e-5)
    if count > 12:  # of full rank
        a, b = statistics(one), statistics(other)
        root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
        apart = (a.mean - b.mean).square().sum()
        spread = a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
        assert found == pytest.approx(float(apart + spread), rel=1e-9)


def test_equal_statistics_are_at_no_distance_even_where_singular():
    found = statistics(drawn(5, 12, 1))
    assert abs(frechet_distance(found, found)) < 1e-4


def test_what_has_no_distance_is_refused():
    with pytest.raises(InputError, match="the same number of features, not 12 and 3"):
        frechet_distance(statistics(drawn(9, 12, 0)), statistics(drawn(9, 3, 0)))
    with pytest.raises(InputError, match="at least 2 for a covariance, not 1"):
        statistics(drawn(1, 3, 0))
