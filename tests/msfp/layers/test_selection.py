import copy

import pytest
import torch
from families import FAMILIES, make
from torch import nn

from msfp import InputError, QuantizationConfig, quantize
from msfp.layers.selection import quantizable_layers, settings_by_layer


def bits_by_layer(denoiser, config):
    settings = settings_by_layer(denoiser, config)
    return {name: (each.weight_bits, each.activation_bits) for name, each in settings.items()}


class Backwards(nn.Module):
    """Runs its layers in the opposite order of their definition."""

    def __init__(self):
        super().__init__()
        self.c, self.b, self.a = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_and_convolution_layers_are_found(family):
    layers = quantizable_layers(make(family))
    assert len(layers) > 20
    assert {type(layer) for layer in layers.values()} <= {nn.Linear, nn.Conv1d, nn.Conv2d}


def test_subclasses_that_may_do_anything_are_left_alone():
    assert list(quantizable_layers(nn.MultiheadAttention(4, 1))) == []


def test_the_ends_of_a_plain_network_are_those_that_run_first_and_last():
    network = Backwards()
    quantize(network, QuantizationConfig(), calibration=lambda network: network(torch.randn(9, 4)))
    bits = {n: m.formats.weight.bits for n, m in network.named_children()}
    assert bits == {"a": 8, "b": 4, "c": 8}


def test_ends_can_be_named():
    config = QuantizationConfig(first_layers=("b",), last_layers=("c",), activation_bits=None)
    assert bits_by_layer(Backwards(), config) == {
        "c": (8, None),
        "b": (8, None),
        "a": (4, None),
    }


def test_ends_that_are_not_known_are_refused_with_what_to_do_unless_bits_are_the_same():
    config = QuantizationConfig(activation_bits=None)
    message = "Backwards has no layer named conv_in or .*name it in first_layers, or set end_bits"
    with pytest.raises(InputError, match=message):
        bits_by_layer(Backwards(), config)
    same = QuantizationConfig(activation_bits=None, end_bits=4)
    assert set(bits_by_layer(Backwards(), same).values()) == {(4, None)}


def test_an_end_that_is_excluded_is_not_missed():
    config = QuantizationConfig(exclude=("conv_in", "conv_out"), activation_bits=None)
    assert set(bits_by_layer(make("unet"), config).values()) == {(4, None)}


def test_inner_layers_of_the_name_of_an_end_are_inner():
    bits = bits_by_layer(make("conditional_unet"), QuantizationConfig())
    assert bits["down_blocks.0.attentions.0.proj_out"] == (4, 4)
    assert bits["conv_out"] == (8, 8)


def test_what_is_refused_leaves_the_denoiser_as_it_was():
    network = Backwards()
    with torch.no_grad():
        network.a.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="the weight of layer 'a' is not finite"):
        quantize(network, QuantizationConfig(activation_bits=None, end_bits=4))
    assert all(type(layer) is nn.Linear for layer in network.children())
    empty = copy.deepcopy(network).to("meta")
    with pytest.raises(InputError, match="the weight of layer 'c' has no numbers"):
        quantize(empty, QuantizationConfig(activation_bits=None, end_bits=4))
    with pytest.raises(InputError, match=r"calibration must be given.* or activation_bits be None"):
        quantize(network, QuantizationConfig(end_bits=4))
