"""Multiply-adds by weight."""

import torch
from torch import nn
from torch.nn import functional as F

from msfp import calibrate
from msfp.search.product_trace import OF_ACTIVATIONS, ProductTrace


class Network(nn.Module):
    """Products of every kind."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.image = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.back = nn.ConvTranspose1d(4, 3, 2)
        self.experts = nn.Parameter(torch.ones(5, 4, 7))
        self.mixed = nn.Parameter(torch.ones(4, 2))

    def forward(self, x):
        y = self.linear(x)  # (2, 9, 4)
        self.image(y.mT.reshape(2, 4, 3, 3))
        self.back(y.mT)
        y @ self.experts[1]
        torch.einsum("btc,cd->btd", y, self.mixed)
        F.linear(y, self.mixed.T)
        y @ y.mT
        F.scaled_dot_product_attention(y, y, y)
        y + y
        return y


def test_products_count_for_the_weight_that_they_multiply_by():
    network = Network()
    with torch.no_grad(), ProductTrace(network) as trace:
        network(torch.ones(2, 9, 8))
    tokens = 2 * 9
    assert trace.counts == {
        "linear.weight": tokens * 8 * 4,
        "image.weight": tokens * 6 * 2 * 9,
        "back.weight": tokens * 4 * 3 * 2,
        "experts": tokens * 4 * 7,
        "mixed": 2 * tokens * 4 * 2,
        OF_ACTIVATIONS: tokens * 9 * 4 + tokens * 9 * (4 + 4),
    }


def test_a_calibration_holds_the_multiply_adds_of_one_forward(tmp_path):
    network = nn.Sequential(nn.Linear(8, 4), nn.SiLU(), nn.Linear(4, 2))
    calls = [lambda network: [network(torch.ones(3, 8)) for _ in range(2)]] * 2
    found = calibrate(network, calls=calls, file=tmp_path / "a.safetensors")
    assert found.multiply_adds == {"0.weight": 96, "2.weight": 24}
    again = calibrate(network, calls=calls, file=tmp_path / "a.safetensors")
    assert again.multiply_adds == found.multiply_adds


def test_the_attention_of_torch_counts_for_its_weights():
    network = nn.MultiheadAttention(8, 2, batch_first=True)
    x, y = torch.ones(3, 5, 8), torch.ones(3, 7, 8)
    with ProductTrace(network) as trace:
        network(x, y, y)
    assert trace.counts == {
        "in_proj_weight": (3 * 5 + 2 * 3 * 7) * 8 * 8,
        "out_proj.weight": 3 * 5 * 8 * 8,
        OF_ACTIVATIONS: 2 * 3 * 5 * 7 * 8,
    }
