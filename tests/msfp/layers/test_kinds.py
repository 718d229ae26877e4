import pytest
import torch
from torch import nn

from msfp import InputError
from msfp.layers.kinds import KINDS, groups_of, kernel_shape, kind_of, plain_class

LAYERS = {
    "linear": (nn.Linear(4, 6), (5, 7, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (5, 4, 9)),
    "circular": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (5, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1)), (5, 4, 9, 8)),
    "same": (nn.Conv2d(4, 6, 3, padding="same", groups=2), (5, 4, 9, 8)),
    "conv3d": (nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=1), (5, 4, 3, 6, 4)),
}


def case(name):
    layer, shape = LAYERS[name]
    return layer, torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LAYERS)
def test_a_kind_computes_what_its_layers_do(name):
    layer, x = case(name)
    with torch.no_grad():
        assert torch.equal(kind_of(layer).compute(layer, x, layer.weight, layer.bias), layer(x))
        without = kind_of(layer).compute(layer, x, 2 * layer.weight, None)
        bias = kind_of(layer).rows(layer, layer(x)) - kind_of(layer).rows(layer, without) / 2
    torch.testing.assert_close(bias, layer.bias.view(*bias.shape[:2], 1).expand_as(bias))


@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_mixes_the_channels_of_each_place(name):
    layer, x = case(name)
    kind, matrix = kind_of(layer), torch.randn(3, 4)
    axis = kind.channel_axis(x)
    assert x.shape[axis] == 4
    expected = torch.tensordot(x, matrix, ([axis], [1])).movedim(-1, axis)
    torch.testing.assert_close(kind.mix(x, matrix), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_channels_are_found_without_a_batch_too(name):
    layer, x = case(name)
    with torch.no_grad():
        for given in (x, x[0]):
            y = layer(given)
            assert given.shape[kind_of(layer).channel_axis(given)] == 4
            assert y.shape[kind_of(layer).channel_axis(y)] == 6


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_of_the_matrix_has_the_shape_of_its_part_of_the_weight(name):
    layer, _ = case(name)
    matrix = layer.weight.flatten(1)
    assert kernel_shape(layer, matrix) == layer.weight.shape[1:]
    assert groups_of(layer) == {"conv1d": 2, "same": 2}.get(name, 1)


def test_a_subclass_is_of_the_kind_of_its_plain_class():
    class Own(nn.Conv1d):
        """Anything."""

    for plain, kind in {nn.Conv1d: KINDS[nn.Conv1d], Own: KINDS[nn.Conv1d]}.items():
        assert plain_class(plain) is nn.Conv1d
        assert kind_of(plain(1, 1, 1)) is kind


@pytest.mark.parametrize(
    "layer",
    [nn.ConvTranspose3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Bilinear(1, 1, 1), nn.SiLU()],
)
def test_what_is_of_no_kind_is_refused(layer):
    name = type(layer).__name__
    message = f"{name} cannot be quantized: it is none of Linear, Conv1d, Conv2d"
    with pytest.raises(InputError, match=message):
        plain_class(type(layer))
    with pytest.raises(InputError, match=message):
        kind_of(layer)
