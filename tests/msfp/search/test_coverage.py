"""Shares of a network in few bits."""

import pytest
import torch
from tiny import SAMPLER, tiny_pipeline
from torch import nn

from msfp import (
    Coverage,
    InputError,
    QuantizationConfig,
    inspect_coverage,
    load,
    pack,
    quantize,
    save,
)


class Mixed(nn.Module):
    """Layers of which one is quantized, one never runs, and one is of another class."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.idle = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_shares_add_up_and_what_stays_is_named():
    network = Mixed()
    with pytest.warns(UserWarning, match="never ran"):
        quantize(network, calibration=lambda network: network(torch.randn(4, 8)))
    pack(network)
    found = inspect_coverage(network)
    shares = found.shares()
    assert list(shares) == [8, 0]
    for place in (0, 1):
        assert sum(each[place] for each in shares.values()) == pytest.approx(1)
    assert found.parameters == sum(each.numel() for each in Mixed().parameters())
    assert found.multiply_adds == 2 * 4 * 64
    assert shares[8] == (2 * 64 / found.parameters, 1)
    left = found.left()
    assert {name: each.kind for name, each in left.items()} == {
        "attention": "MultiheadAttention",
        "idle": "Linear",
        "attention.out_proj": "NonDynamicallyQuantizableLinear",
    }
    assert left["attention"].parameters == 3 * 64
    assert "among them attention (MultiheadAttention), idle (Linear)" in found.sentences()[-1]


def test_the_coverage_is_saved_and_loaded(tmp_path):
    pipe = tiny_pipeline()
    quantize(pipe, QuantizationConfig(refine=None), calibration=SAMPLER.calls(4, seed=1))
    pack(pipe)
    save(pipe, tmp_path / "packed")
    found = inspect_coverage(pipe)
    assert found.shares()[4][1] > 0.5
    assert (
        inspect_coverage(tmp_path / "packed")
        == found
        == inspect_coverage(load(tmp_path / "packed"))
    )


def test_without_calls_only_parameters_are_known():
    network = nn.Sequential(nn.Linear(8, 8))
    quantize(network, QuantizationConfig(activation_bits=None, end_bits=4))
    pack(network)
    assert inspect_coverage(network).shares()[4] == (64 / 72, None)


@pytest.mark.parametrize("values", [3, {}, {"parameters": 1, "multiply_adds": None, "weights": 3},
    {"parameters": "a", "multiply_adds": None, "weights": {}}])  # fmt: skip
def test_a_table_of_another_form_is_refused(values):
    with pytest.raises(InputError, match="coverage must"):
        Coverage.from_dict(values)
