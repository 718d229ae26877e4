import pytest
import torch
from torch import nn

from msfp import QuantizationConfig, pack, quantize
from msfp.layers.base import quantized_layers
from msfp.layers.execution import backends
from msfp.layers.execution.float_path import FloatPath
from msfp.layers.lora.routers import SegmentRouter
from msfp.layers.lora.talora import LoRAHub
from msfp.layers.packed import add_router
from msfp.layers.trainable import trainable_layers
from msfp.ptq.low_rank_branches import add_branches


class Network(nn.Module):
    """A layer of each kind, and a timestep argument."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Conv1d(6, 12, 3, padding=1)
        self.plane = nn.Conv2d(12, 12, (1, 3))
        self.out = nn.Linear(12, 6)

    def forward(self, sample, timestep):  # noqa: ARG002 - the router reads it
        return self.out(self.plane(self.line(sample)[:, :, None])[:, :, 0].mT)


SAMPLE = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "scales": {},
    "inputs as they are": {"activation_bits": None},
    "blocks": {"scheme": "mx"},
}


def call(network, timestep=100):
    with torch.no_grad():
        return network(SAMPLE, timestep)


def quantized(**config):
    network = Network()
    quantize(network, QuantizationConfig(**{"refine": None} | config), calibration=call)
    return network


class Own:
    """A back end of the layers of some classes, with the product times a factor."""

    name = "own"

    def __init__(self, *classes, factor=1.0):
        self.classes, self.factor, self.shown, self.taken = classes, factor, [], []

    def takes(self, layer, x):
        self.shown.append((layer, x))
        return isinstance(layer, self.classes)

    def product(self, layer, x, adapter):
        assert isinstance(layer, self.classes)
        self.taken.append((layer, adapter))
        return self.factor * FloatPath().product(layer, x, adapter)


@pytest.fixture
def put(monkeypatch):
    """A function that puts back ends before those that there are."""

    def put(*others):
        monkeypatch.setattr(backends, "BACKENDS", [*others, *backends.BACKENDS])

    return put


def test_the_float_path_is_the_last_and_takes_everything():
    network = quantized()
    assert type(backends.BACKENDS[-1]) is FloatPath
    for layer in quantized_layers(network).values():
        assert backends.BACKENDS[-1].takes(layer, SAMPLE)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_back_end_computes_what_it_takes_and_outputs_are_the_same_bits(config, packed, put):
    network = quantized(**CONFIGS[config])
    if packed:
        pack(network)
    expected = call(network)
    own = Own(nn.Conv1d, nn.Linear)
    put(own)
    assert torch.equal(call(network), expected)
    assert own.taken == [(network.line, 0), (network.out, 0)]


def test_the_product_of_the_back_end_is_the_output(put):
    network = quantized()
    pack(network)
    x = torch.randn(5, 12)
    expected = network.out(x)
    put(Own(nn.Linear, factor=2.0))
    assert torch.equal(network.out(x), 2 * expected)


def test_a_back_end_that_does_not_take_a_layer_is_passed_over(put):
    network = quantized()
    pack(network)
    expected = call(network)
    none, linear, later = Own(), Own(nn.Linear), Own(nn.Linear, nn.Conv2d)
    put(none, linear, later)
    assert torch.equal(call(network), expected)
    layers = [network.line, network.plane, network.out]
    assert [layer for layer, _ in none.shown] == [layer for layer, _ in linear.shown] == layers
    assert [layer for layer, _ in later.shown] == layers[:2]  # the first that takes it computes it
    assert not none.taken
    assert linear.taken == [(network.out, 0)]
    assert later.taken == [(network.plane, 0)]


def test_a_back_end_is_shown_the_input_before_it_is_rounded(put):
    network = quantized()
    own = Own(nn.Conv1d)
    put(own)
    call(network)
    assert torch.equal(own.shown[0][1], SAMPLE)


def test_what_stands_beside_the_weight_is_added_to_the_product(put):
    network = quantized(end_bits=4)
    add_branches(network, 1, bits=16)
    pack(network)
    expected = call(network)
    assert network.line.formats.branch_rank == 1
    own = Own(nn.Module)
    put(own)
    assert torch.equal(call(network), expected)
    assert len(own.taken) == 3
    put(Own(nn.Module, factor=0.0))
    layer = network.line
    branch = layer.low_rank(SAMPLE, layer.branch_down, layer.branch_up)
    assert torch.equal(layer(SAMPLE), branch)


def test_a_back_end_is_told_the_adapter(put):
    network = quantized()
    for layer in trainable_layers(network).values():
        rows, columns = layer.weight.flatten(1).shape
        draw = torch.Generator().manual_seed(2)
        layer.hub = LoRAHub(rows, columns, 2, 1, torch.tensor(0.1), draw)
        layer.hub.up.data.normal_(generator=draw)
    add_router(network, SegmentRouter(3, 2, torch.tensor([500.0])))
    pack(network)
    times = (100, 900, torch.tensor([100, 900, 100]))
    expected = [call(network, time) for time in times]
    assert not torch.equal(*expected[:2])
    own = Own(nn.Module)
    put(own)
    for time, before, adapters in zip(times, expected, ([0], [1], [0, 1]), strict=True):
        own.taken.clear()
        assert torch.equal(call(network, time), before)
        assert [adapter for _, adapter in own.taken] == adapters * 3
