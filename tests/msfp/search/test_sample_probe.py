import families
import pytest
import torch
from torch import nn

from msfp import QuantizationConfig, calibrate, quantize
from msfp.pipelines.denoiser import denoiser_of


@pytest.mark.parametrize("family", families.SOME)
def test_the_path_of_the_sample_begins_and_ends_with_the_named_layers(family, tmp_path):
    pipe = families.pipeline(family, tmp_path)
    path = calibrate(pipe, calls=families.images).sample_path
    assert {path[0], path[-1]} == families.ENDS[family]
    time = [name for name, _ in denoiser_of(pipe).named_modules() if "time" in name]
    assert time
    assert not set(time) & set(path)


class Network(nn.Module):
    """A network whose first layers read its condition, and whose sample comes second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.condition, self.read = nn.Linear(3, 8), nn.Linear(4, 8)
        self.middle, self.write, self.scale = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(3, 4)

    def forward(self, condition, sample):
        hidden = self.condition(condition) + self.read(sample)
        for _ in range(2):
            hidden = self.middle(hidden).relu()
        return self.write(hidden) * self.scale(condition)


def call(network):
    return network(torch.ones(2, 3), sample=torch.linspace(-1, 1, 8).view(2, 4))


def test_layers_that_read_the_sample_and_write_the_prediction_get_the_bits_of_the_ends():
    network = Network()
    assert calibrate(network, calls=call).sample_path == ["read", "middle", "write"]
    quantize(network, QuantizationConfig(refine=None), calibration=call)
    bits = {name: layer.formats.weight.bits for name, layer in network.named_children()}
    assert bits == {"condition": 4, "read": 8, "middle": 4, "write": 8, "scale": 4}


def test_names_in_the_config_go_before_the_path():
    network = Network()
    config = QuantizationConfig(refine=None, first_layers=["condition"])
    quantize(network, config, calibration=call)
    bits = {name: layer.formats.weight.bits for name, layer in network.named_children()}
    assert bits == {"condition": 8, "read": 4, "middle": 4, "write": 8, "scale": 4}


def test_probing_changes_neither_the_histograms_nor_random_numbers():
    class Noisy(Network):
        def forward(self, condition, sample):
            return super().forward(condition, sample + torch.randn(4))

    torch.manual_seed(0)
    found = calibrate(Noisy(), calls=[call, call])
    state = torch.get_rng_state()
    torch.manual_seed(0)
    network, counts = Noisy(), dict.fromkeys(found.inputs, 0)

    def count(layer, args):
        counts[names[layer]] += args[0].numel()

    names = {layer: name for name, layer in network.named_children()}
    for layer in names:
        layer.register_forward_pre_hook(count)
    call(network)
    call(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: histogram.count for name, histogram in found.inputs.items()} == counts
