import pytest
import torch
from torch import nn

from msfp.layers.kinds import kind_of
from msfp.ptq.moments import Moments, as_matrix, layer_moments, matched_bias, matched_matrix
from msfp.ptq.rounding.gptq import damped, upper_factor

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even")

LAYERS = {
    "plain": nn.Conv2d(4, 6, 3),
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "uneven": nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "pointwise": nn.Conv2d(4, 6, 1),
    "same": nn.Conv2d(4, 6, 4, padding="same"),
    "circular": nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
    "one dimension": nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
    "one dimension, circular": nn.Conv1d(4, 6, 4, padding=3, padding_mode="circular"),
    "three dimensions": nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=1, dilation=(2, 1, 1)),
    "three dimensions, grouped": nn.Conv3d(4, 6, 2, padding="same", groups=2),
    "linear": nn.Linear(4, 6),
    "tokens": nn.Linear(4, 6),
}


def inputs_of(name):
    generator = torch.Generator().manual_seed(0)
    shape = {"linear": (5, 4), "tokens": (5, 7, 4)}.get(name, (5, 4, 9, 8))
    if name.startswith("one dimension"):
        shape = (5, 4, 9)
    if name.startswith("three dimensions"):
        shape = (5, 4, 5, 6, 3)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_is_its_matrix_times_its_columns(name):
    layer, x = LAYERS[name].double(), inputs_of(name)
    product = as_matrix(layer, layer.weight) @ kind_of(layer).columns(layer, x)
    expected = kind_of(layer).rows(layer, layer(x)) - layer.bias.view(*product.shape[:2], 1)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_moments_are_those_of_the_columns_however_they_are_chunked(name, monkeypatch):
    layer, x = LAYERS[name].double(), inputs_of(name)
    y = layer(x)
    whole = layer_moments(layer, [(x, y)], len(x))
    monkeypatch.setattr("msfp.ptq.moments.MAX_CHUNK", 1)
    parts = layer_moments(layer, zip(x.split(2), y.split(2), strict=True), len(x))
    columns, rows = kind_of(layer).columns(layer, x), kind_of(layer).rows(layer, y)
    for group, (a, b) in enumerate(zip(columns, rows, strict=True)):
        joint = torch.cov(torch.cat([a, b]), correction=0)
        size = len(a)
        for moments in (whole, parts):
            assert moments.positions == a.shape[1]
            torch.testing.assert_close(moments.input_mean[group], a.mean(1))
            torch.testing.assert_close(moments.output_mean[group], b.mean(1))
            torch.testing.assert_close(moments.second(centred=False)[group], a @ a.T / a.shape[1])
            torch.testing.assert_close(moments.second(centred=True)[group], joint[:size, :size])
            torch.testing.assert_close(moments.cross(centred=False)[group], b @ a.T / a.shape[1])
            torch.testing.assert_close(moments.cross(centred=True)[group], joint[size:, :size])


@torch.no_grad()
def test_a_draw_of_positions_is_seeded_and_estimates_the_whole():
    layer = LAYERS["padded"].double()
    x = torch.randn(16, 4, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    draws = [
        layer_moments(
            layer, [(x, y)], len(x), most=4000, generator=torch.Generator().manual_seed(2)
        )
        for _ in range(2)
    ]
    assert draws[0].positions == 4000
    assert torch.equal(draws[0].second(centred=True), draws[1].second(centred=True))
    whole = layer_moments(layer, [(x, y)], len(x)).second(centred=True)
    assert (draws[0].second(centred=True) - whole).norm() < 0.2 * whole.norm()


@torch.no_grad()
def test_what_is_selected_is_added():
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    y = layer(x)
    moments = layer_moments(layer, [(x, y)], 5, select=lambda a, b: (a[:, 1:], 2 * b))
    alone = Moments(1, 3, 3)
    alone.add(x.mT[None, 1:], 2 * y.mT[None])
    assert torch.equal(moments.second(centred=True), alone.second(centred=True))
    assert torch.equal(moments.cross(centred=False), alone.cross(centred=False))


def test_taken_moments_are_those_that_were_there():
    moments = moments_of(random(2, 6, 50), random(2, 4, 50, seed=1))
    expected = moments.second(centred=True)
    assert torch.equal(moments.take_second(centred=True), expected)


def test_fewer_positions_than_asked_for_are_all_used():
    layer = nn.Linear(2, 3)
    moments = layer_moments(layer, [(torch.ones(5, 2), torch.ones(5, 3))], 5, most=100)
    assert moments.positions == 5
    assert isinstance(moments, Moments)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(x, y):
    moments = Moments(*y.shape[:2], x.shape[1], dtype=torch.float64)
    moments.add(x, y)
    return moments


def matched(matrix, moments, damping, centred):
    upper = upper_factor(damped(moments.second(centred=centred), damping))
    return matched_matrix(matrix, moments.residual(matrix, centred=centred), upper)


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
    bias = matched_bias(found, moments.input_mean, moments.output_mean).view(2, 4)
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
    bias = matched_bias(found, moments.input_mean, moments.output_mean)
    torch.testing.assert_close(bias, torch.full((8,), 0.7).double())


def test_the_mean_output_is_the_wanted_one_for_any_matrix(example):
    _, read, _, wanted = example
    rounded = random(2, 4, 6, seed=9)
    moments = moments_of(read, wanted)
    bias = matched_bias(rounded, moments.input_mean, moments.output_mean).view(2, 4, 1)
    torch.testing.assert_close((rounded @ read + bias).mean(-1), wanted.mean(-1))


def test_inputs_that_are_always_zero_leave_the_matrix_alone(example):
    _, read, matrix, wanted = example
    found = matched(matrix, moments_of(0 * read, wanted), damping=0.01, centred=True)
    assert torch.equal(found, matrix)
