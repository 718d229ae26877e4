import pytest
import torch

from msfp.ptq.correction import matched_bias, matched_matrix
from msfp.ptq.moments import Moments
from msfp.ptq.rounding.gptq import damped, upper_factor


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(x, y):
    moments = Moments(*y.shape[:2], x.shape[1], dtype=torch.float64)
    moments.add(x, y)
    return moments


def matched(matrix, moments, damping, centred):
    upper = upper_factor(damped(moments.second(centred=centred), damping))
    return matched_matrix(matrix, moments, upper, centred=centred)


@pytest.fixture
def example():
    """Full-precision columns, what is read of them, a matrix, and the wanted outputs."""
    full = random(2, 6, 500) + 1
    read = full + 0.3 * random(2, 6, 500, seed=1) + 0.2
    matrix = random(2, 4, 6, seed=2)
    return full, read, matrix, matrix @ full + 0.7


def test_without_damping_it_is_least_squares_with_an_intercept(example):
    _, read, matrix, wanted = example
    moments = moments_of(read, wanted)
    found = matched(matrix, moments, damping=0, centred=True)
    bias = matched_bias(found, moments).view(2, 4)
    for group in range(2):
        columns = torch.cat([read[group], torch.ones(1, 500, dtype=torch.float64)])
        solution = torch.linalg.lstsq(columns.T, wanted[group].T).solution.T
        torch.testing.assert_close(found[group], solution[:, :-1])
        torch.testing.assert_close(bias[group], solution[:, -1])


def test_damping_is_ridge_regression_towards_the_matrix(example):
    _, read, matrix, wanted = example
    second = read @ read.mT / 500
    pull = 0.1 * second.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    identity = torch.eye(6, dtype=torch.float64)
    right = wanted @ read.mT / 500 + pull * matrix
    expected = torch.linalg.solve(second + pull * identity, right, left=False)
    found = matched(matrix, moments_of(read, wanted), damping=0.1, centred=False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("damping", [0, 0.01, 1])
def test_inputs_without_error_leave_the_matrix_and_the_bias_alone(example, damping):
    full, _, matrix, wanted = example
    moments = moments_of(full, wanted)
    found = matched(matrix, moments, damping=damping, centred=True)
    torch.testing.assert_close(found, matrix)
    torch.testing.assert_close(matched_bias(found, moments), torch.full((8,), 0.7).double())


def test_the_mean_output_is_the_wanted_one_for_any_matrix(example):
    _, read, _, wanted = example
    rounded = random(2, 4, 6, seed=9)
    bias = matched_bias(rounded, moments_of(read, wanted)).view(2, 4, 1)
    torch.testing.assert_close((rounded @ read + bias).mean(-1), wanted.mean(-1))


def test_inputs_that_are_always_zero_leave_the_matrix_alone(example):
    _, read, matrix, wanted = example
    found = matched(matrix, moments_of(0 * read, wanted), damping=0.01, centred=True)
    assert torch.equal(found, matrix)
