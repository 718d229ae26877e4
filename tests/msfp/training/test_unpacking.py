import copy

import pytest
import torch
from torch import nn

from msfp import InputError, QuantizationConfig, pack, quantize
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.trainable import trainable_layers
from msfp.ptq.low_rank_branches import add_branches
from msfp.training.teacher import Teacher
from msfp.training.unpacking import unpack


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Flatten(2)
    return nn.Sequential(*layers, nn.Linear(36, 16), nn.GroupNorm(2, 8))


INPUT = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def packed(full, change=lambda _: None):
    """A packed copy of a network, changed before it was packed."""
    packed = copy.deepcopy(full)
    config = QuantizationConfig(end_bits=4, refine=None)
    quantize(packed, config, calibration=lambda network: network(INPUT))
    change(packed)
    pack(packed)
    return packed


def split(network):
    """Give a layer an input scale for each channel."""
    old = network[2].input_quantizer
    scale = old.scale * torch.linspace(0.5, 2, 8).view(-1, 1, 1)
    network[2].input_quantizer = Quantizer(old.format, scale, old.zero_point)


def round_otherwise(network):
    """Put weights on values of the grid that are not the nearest, as GPTQ does behind the first."""
    for layer in list(trainable_layers(network).values())[1:]:
        moved = layer.weight + 0.6 * layer.weight_quantizer.scale * torch.randn_like(layer.weight)
        layer.weight = nn.Parameter(layer.weight_quantizer(moved).detach(), requires_grad=False)


CHANGES = {
    "nothing": lambda _: None,
    "split": split,
    "rounding": round_otherwise,
    "branches": lambda network: add_branches(network, 2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_gives_the_bits_of_the_packed_one_and_packs_to_the_same_weights(change):
    full = network()
    student = packed(full, change)
    with torch.no_grad():
        expected, weight = student(INPUT), student[2].weight.clone()
        assert unpack(student, original=full) == ["0", "2", "4"]
        assert list(trainable_layers(student)) == ["0", "2", "4"]
        assert torch.equal(student(INPUT), expected)
        assert pack(student) == ["0", "2", "4"]
        assert torch.equal(student(INPUT), expected)
    assert torch.equal(student[2].weight, weight)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_full_precision_denoiser_is_still_inside(change):
    full = network()
    student = packed(full, change)
    unpack(student, original=full)
    with Teacher(student, full).active() as teacher, torch.no_grad():
        assert torch.equal(teacher(INPUT), full(INPUT))


def test_what_is_alike_is_shared():
    full = network()
    student = packed(full)
    unpack(student, original=full)
    for name in ("2.weight", "2.bias", "5.weight"):
        assert student.get_parameter(name).data_ptr() == full.get_parameter(name).data_ptr()


def test_weights_stay_in_full_precision_where_they_round_to_the_packed_value():
    full = network()
    student = packed(full, round_otherwise)
    unpack(student, original=full)
    same = student[2].weight == full[2].weight
    assert 0.3 < same.float().mean() < 0.9
    values = student[2].weight_quantizer(student[2].weight)
    assert torch.equal(student[2].weight[~same], values[~same])


def test_what_cannot_be_unpacked_is_refused_and_left_as_it_was():
    full = network()
    with pytest.raises(InputError, match="must be quantized and packed"):
        unpack(network(), original=full)
    student = packed(full)
    other = network()
    other[4] = nn.Linear(36, 8)
    with pytest.raises(InputError, match=r"of its 4 has the shape \(8, 36\), not \(16, 36\)"):
        unpack(student, original=other)
    with pytest.raises(InputError, match="it has no layer 4"):
        unpack(student, original=full[:4])
    student[2].adapters = 2
    with pytest.raises(InputError, match="layer 2 has 2 weights"):
        unpack(student, original=full)
    assert not trainable_layers(student)
