import families
import pytest
import torch
from torch import nn

from msfp import QuantizationConfig, calibrate, quantize
from msfp.pipelines.denoiser import denoiser_of


@pytest.mark.parametrize("family", families.SOME)
def test_the_path_of_the_sample_begins_and_ends_with_the_named_layers(family, tmp_path):
    pipe = families.pipeline(family, tmp_path)
    found = calibrate(pipe, calls=families.images)
    assert {*found.readers, *found.writers} == families.ENDS[family]
    path = found.sample_path
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


class TwoSamples(nn.Module):
    """A network of a video and its sound, which are cut into patches and put together again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.picture_in, self.sound_in = (
            nn.Linear(*n) for n in ((1, 8), (4, 8), (3, 8))
        )
        self.mixed, self.middle = nn.Linear(8, 8), nn.Linear(8, 8)
        self.picture_out, self.sound_out = nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, picture, sound, time):
        patches = picture.unflatten(2, (2, 2)).permute(0, 1, 3, 2).flatten(2)
        hidden = self.picture_in(patches) + self.time(time)
        heard = self.sound_in(sound) + self.time(time) + self.mixed(hidden.mean(1, keepdim=True))
        hidden = self.middle(hidden).relu()
        patches = self.picture_out(hidden).unflatten(2, (2, 2)).permute(0, 1, 3, 2).flatten(2)
        return patches, self.sound_out(heard)


def test_every_sample_has_a_layer_that_reads_it_and_one_that_writes_its_prediction():
    def call(network):
        torch.manual_seed(1)
        return network(torch.randn(2, 5, 4), torch.randn(2, 6, 3), torch.ones(1))

    found = calibrate(TwoSamples(), calls=call)
    assert found.readers == ["picture_in", "sound_in"]
    assert sorted(found.writers) == ["picture_out", "sound_out"]
    assert "time" not in found.sample_path
    network = TwoSamples()
    quantize(network, QuantizationConfig(refine=None), calibration=call)
    bits = {name: layer.formats.weight.bits for name, layer in network.named_children()}
    assert {name for name, width in bits.items() if width == 8} == {*found.readers, *found.writers}


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
