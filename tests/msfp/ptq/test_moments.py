import pytest
import torch
from torch import nn

from msfp.ptq.moments import Moments, as_columns, as_matrix, as_rows, layer_moments

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
    "linear": nn.Linear(4, 6),
    "tokens": nn.Linear(4, 6),
}


def inputs_of(name):
    generator = torch.Generator().manual_seed(0)
    shape = {"linear": (5, 4), "tokens": (5, 7, 4)}.get(name, (5, 4, 9, 8))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_is_its_matrix_times_its_columns(name):
    layer, x = LAYERS[name].double(), inputs_of(name)
    product = as_matrix(layer, layer.weight) @ as_columns(layer, x)
    expected = as_rows(layer, layer(x)) - layer.bias.view(*product.shape[:2], 1)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_moments_are_those_of_the_columns_however_they_are_chunked(name, monkeypatch):
    layer, x = LAYERS[name].double(), inputs_of(name)
    y = layer(x)
    whole = layer_moments(layer, x, y)
    monkeypatch.setattr("msfp.ptq.moments.MAX_CHUNK", 1)
    parts = layer_moments(layer, x, y)
    columns, rows = as_columns(layer, x), as_rows(layer, y)
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
        layer_moments(layer, x, y, most=4000, generator=torch.Generator().manual_seed(2))
        for _ in range(2)
    ]
    assert draws[0].positions == 4000
    assert torch.equal(draws[0].second(centred=True), draws[1].second(centred=True))
    whole = layer_moments(layer, x, y).second(centred=True)
    assert (draws[0].second(centred=True) - whole).norm() < 0.2 * whole.norm()


def test_fewer_positions_than_asked_for_are_all_used():
    layer = nn.Linear(2, 3)
    moments = layer_moments(layer, torch.ones(5, 2), torch.ones(5, 3), most=100)
    assert moments.positions == 5
    assert isinstance(moments, Moments)
