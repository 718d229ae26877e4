import pytest
import torch
from torch import nn

from msfp import InputError, QuantizationConfig, quantize
from msfp.ptq import space

GIGA = 10**9


def layers():
    """A weight of 0.8 GB, and second moments of 0.6 GB, without memory."""
    return [nn.Linear(12_288, 16_384, device="meta")]


@pytest.mark.parametrize(
    ("free", "options", "text"),
    [
        (1 * GIGA, {"refined": True, "offload": True}, r"needs 3\.2 GB .* 1\.0 GB are free$"),
        (3.5 * GIGA, {"refined": True, "offload": False}, r"4\.0 GB .* give offload=True.* 3\.2"),
        (3 * GIGA, {"refined": False, "offload": False}, r"needs 3\.2 GB .* 3\.0 GB are free$"),
    ],
)
def test_what_needs_more_memory_than_is_free_is_refused(free, options, text, monkeypatch):
    monkeypatch.setattr(space, "available_bytes", lambda: int(free))
    with pytest.raises(InputError, match=text):
        space.check_memory(layers(), **options)
    monkeypatch.setattr(space, "available_bytes", lambda: int(free) + GIGA)
    if free > GIGA:
        space.check_memory(layers(), **options)


def test_too_little_memory_is_refused_before_the_calls(monkeypatch):
    def refuse(_network):
        raise AssertionError

    monkeypatch.setattr(space, "available_bytes", lambda: 1000)
    network = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InputError, match="of memory beside the model, of which"):
        quantize(network, QuantizationConfig(end_bits=4), calibration=refuse)
    assert type(network[0]) is nn.Linear
    monkeypatch.setattr(space, "available_bytes", lambda: None)  # unknown
    quantize(network, QuantizationConfig(end_bits=4), calibration=lambda net: net(torch.ones(4, 8)))
