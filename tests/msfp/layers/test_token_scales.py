"""Inputs of linear layers with a scale for each token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fpformats import encode_steps, parse
from msfp.layers.execution import backends, operators, triton_path
from msfp.layers.execution.grids import LARGEST, SMALLEST, token_sizes
from msfp.layers.execution.onednn import OneDNN
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.families import TrainableLinear
from msfp.layers.formats import LayerFormats, read_formats

needs_integer_units = pytest.mark.skipif(
    operators.fuses(wide=False) is None, reason="torch has no integer operators here"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["E2M1", "E1M2", "E2M2U", "E3M1U", "E0M7"]


def trainable(inputs="E2M1", zero=3, bias=True):
    draw = torch.Generator().manual_seed(0)
    plain = nn.Linear(12, 6, bias=bias)
    for each in plain.parameters():
        each.data = torch.randn(each.shape, generator=draw)
    fmt, own = parse(inputs), parse("E2M1")
    scale = torch.tensor(0.9 / float(fmt.max))
    shift = None if fmt.signed else -zero * (scale * fmt.step)
    rows = Quantizer(own, plain.weight.detach().abs().amax(1, keepdim=True) / 6)
    return TrainableLinear.wrap(plain, rows, Quantizer(fmt, scale, shift, by_token=True))


def tokens(dtype=torch.float32):
    """Tokens of very different sizes, one of them zero."""
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))
    x = (x * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    x[0, 0] = 0
    return x


def by_definition(layer, x):
    """The output: sums in Python's integers, then one rounding for each operation."""
    weights, inputs = layer.quantizers()
    m = encode_steps(
        layer.quantized_weight(dtype=torch.float32), weights.format, weights.scale, dtype="int8"
    ).numpy().astype(object)  # fmt: skip
    fmt, ratio = inputs.format, np.float32(inputs.scale)
    zero = 0.0 if inputs.zero_point is None else np.float32(inputs.zero_point)
    offset = 128 if fmt.signed else round(-float(zero) / float(ratio * np.float32(fmt.step)))
    steps = weights.scale.flatten().numpy() * np.float32(weights.format.step)
    rows = []
    for token in x.reshape(-1, x.shape[-1]).float():
        largest = np.float32(min(max(float(token.abs().max()), SMALLEST), LARGEST))
        shift = None if inputs.zero_point is None else float(largest * zero)
        n = encode_steps(token, fmt, float(largest * ratio), shift).long() - offset
        sums = (m @ n.numpy().astype(object)).astype(np.float64).astype(np.float32)
        y = sums * (np.float32(ratio * np.float32(fmt.step)) * largest) * steps
        rows.append(y if layer.bias is None else y + layer.bias.detach().float().numpy())
    return torch.from_numpy(np.stack(rows)).view(*x.shape[:-1], -1).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_back_end_gives_the_defined_bits(inputs, bias, dtype):
    layer, x = trainable(inputs, bias=bias).pack().to(dtype), tokens(dtype)
    wanted = by_definition(layer, x)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)
        with backends.floats_only():
            assert torch.equal(layer(x), wanted)
        if operators.fuses(wide=False) is not None:
            assert OneDNN().takes(layer, x)
            assert torch.equal(OneDNN().product(layer, x, 0), wanted)
        if dtype == torch.float32:
            assert torch.equal(trainable(inputs, bias=bias)(x), wanted)
            assert torch.equal(layer(x[0, 1]), wanted[0, 1])


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=12, max_size=12
    )
)  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_any_token_gives_the_defined_bits(numbers):
    layer, x = trainable("E2M2U").pack(), torch.tensor([numbers, [1.0] * 12])
    with torch.no_grad():
        y = layer(x)
        with backends.floats_only():
            assert torch.equal(layer(x), y)
    assert torch.equal(y, by_definition(layer, x))


def test_a_token_is_rounded_as_if_alone_whatever_its_size():
    quantizer, x = trainable("E2M2U").input_quantizer, tokens()
    alone = torch.stack([quantizer(token) for token in x.flatten(0, 1)]).view(x.shape)
    assert torch.equal(quantizer(x), alone)
    assert torch.equal(quantizer(2.0**20 * x), 2.0**20 * alone)
    assert torch.equal(quantizer(torch.zeros(2, 12)), torch.zeros(2, 12))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_token(value):
    layer, x = trainable().pack(), tokens()
    with torch.no_grad():
        before = layer(x)
        x[1, 2, 3] = value
        y = layer(x)
        with backends.floats_only():
            assert torch.equal(layer(x).nan_to_num(99), y.nan_to_num(99))
    assert y.isnan().any(-1).nonzero().tolist() == ([[1, 2]] if math.isnan(value) else [])
    others = torch.arange(15) != 7
    assert torch.equal(y.flatten(0, 1)[others], before.flatten(0, 1)[others])


@needs_integer_units
def test_compiling_without_a_graph_break_gives_the_defined_bits():
    layer = trainable("E2M2U").pack().requires_grad_(False)
    network, x = nn.Sequential(nn.ReLU(), layer, nn.ReLU()), tokens()
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, dynamic=False)
        assert torch.equal(compiled(x), by_definition(layer, x.relu()).relu())
        x[0, 1, 0] = math.nan
        assert compiled(x).isnan().any()


def test_gradients_are_those_of_rounding_with_fixed_scales():
    layer, x = trainable("E2M2U"), tokens().requires_grad_()
    for each in (layer.input_quantizer.scale, layer.input_quantizer.zero_point):
        each.requires_grad_()
    layer(x).square().sum().backward()
    found = x.grad.clone(), layer.input_quantizer.scale.grad.clone()
    assert all(each.isfinite().all() and each.any() for each in found)
    inside = found[0][1, 2].abs() > 0
    assert inside.any()  # what is clipped has no gradient


def test_formats_say_that_tokens_have_scales_and_layers_are_trained_again():
    layer = trainable("E2M2U").pack()
    facts = layer.formats.to_dict()
    assert facts["input_granularity"] == "token"
    assert read_formats(facts) == layer.formats == LayerFormats.of(*layer.quantizers(), None)
    again = TrainableLinear.wrap(nn.Linear(12, 6), *layer.quantizers())
    x = tokens()
    assert torch.equal(again.input_quantizer(x), layer.quantize_input(x))


def test_kernels_for_gpus_leave_such_layers_to_floats(monkeypatch):
    for name in ("_is_supported", "agrees"):
        monkeypatch.setattr(triton_path, name, lambda _device: True)
    layer, x = trainable().pack(), tokens()
    path, grids = triton_path.TritonPath("cpu"), layer.integer_grids
    with torch.no_grad():
        assert not path.takes(layer, x)
    assert path.runs(replace(grids, by_token=False), x.device)


def test_sizes_are_magnitudes_within_bounds():
    x = torch.tensor([[1.0, -3.0], [0.0, 0.0], [math.inf, 1.0], [math.nan, 5.0]])
    assert token_sizes(x).flatten().tolist() == [3.0, SMALLEST, LARGEST, 1.0]
    assert token_sizes(x.half()).dtype == torch.float32
