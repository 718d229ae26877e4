import copy

import pytest
import torch
from torch import nn

from msfp import InputError, QuantizationConfig, quantize, seal
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.trainable import open_layers
from msfp.ptq.low_rank_branches import add_branches
from msfp.training.reopening import reopen
from msfp.training.teacher import Teacher


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Flatten(2)
    return nn.Sequential(*layers, nn.Linear(36, 16), nn.GroupNorm(2, 8))


INPUT = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def packed(full, change=lambda _: None):
    """A sealed copy of a network, changed before it was sealed."""
    sealed = copy.deepcopy(full)
    config = QuantizationConfig(first_last=4, refine=None)
    quantize(sealed, config, calibration=lambda network: network(INPUT))
    change(sealed)
    seal(sealed)
    return sealed


def split(opened):
    """Give a layer an input scale for each channel."""
    old = opened[2].input_quantizer
    scale = old.scale * torch.linspace(0.5, 2, 8).view(-1, 1, 1)
    opened[2].input_quantizer = Quantizer(old.format, scale, old.zero_point)


def round_otherwise(opened):
    """Put weights on values of the grid that are not the nearest, as GPTQ does behind the first."""
    for layer in list(open_layers(opened).values())[1:]:
        moved = layer.weight + 0.6 * layer.weight_quantizer.scale * torch.randn_like(layer.weight)
        layer.weight = nn.Parameter(layer.weight_quantizer(moved).detach(), requires_grad=False)


CHANGES = {
    "nothing": lambda _: None,
    "split": split,
    "rounding": round_otherwise,
    "branches": lambda opened: add_branches(opened, 2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_gives_the_bits_of_the_packed_one_and_packs_to_the_same_weights(change):
    full = network()
    student = packed(full, change)
    with torch.no_grad():
        expected, weight = student(INPUT), student[2].weight.clone()
        reopen(student, full)
        assert len(open_layers(student)) == 3
        assert torch.equal(student(INPUT), expected)
        seal(student)
        assert torch.equal(student(INPUT), expected)
    assert torch.equal(student[2].weight, weight)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_full_precision_denoiser_is_still_inside(change):
    full = network()
    student = packed(full, change)
    reopen(student, full)
    with Teacher(student, full).active() as teacher, torch.no_grad():
        assert torch.equal(teacher(INPUT), full(INPUT))


def test_what_is_alike_is_shared():
    full = network()
    student = packed(full)
    reopen(student, full)
    for name in ("2.weight", "2.bias", "5.weight"):
        assert student.get_parameter(name).data_ptr() == full.get_parameter(name).data_ptr()


def test_weights_stay_in_full_precision_where_they_round_to_the_packed_value():
    full = network()
    student = packed(full, round_otherwise)
    reopen(student, full)
    same = student[2].weight == full[2].weight
    assert 0.3 < same.float().mean() < 0.9
    values = student[2].weight_quantizer(student[2].weight)
    assert torch.equal(student[2].weight[~same], values[~same])


def test_what_cannot_be_opened_is_refused_and_left_as_it_was():
    full = network()
    with pytest.raises(InputError, match="must be quantized and sealed"):
        reopen(network(), full)
    student = packed(full)
    other = network()
    other[4] = nn.Linear(36, 8)
    with pytest.raises(InputError, match=r"of its 4 has the shape \(8, 36\), not \(16, 36\)"):
        reopen(student, other)
    with pytest.raises(InputError, match="it has no such layer as 4"):
        reopen(student, full[:4])
    student[2].entries = 2
    with pytest.raises(InputError, match="layer 2 has 2 weights"):
        reopen(student, full)
    assert not open_layers(student)
