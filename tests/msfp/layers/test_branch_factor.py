"""Low-rank branches in 8 bits, against their definition in Python's integers."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fpformats import encode_steps
from msfp.layers.branch_factor import FACTOR_FORMAT, INPUT_FORMAT, BranchFactor
from msfp.layers.execution import backends
from msfp.layers.execution.onednn import OneDNN
from msfp.layers.execution.triton_path import TritonPath
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.lora.routers import SegmentRouter
from msfp.layers.lora.talora import LoRAHub
from msfp.layers.packed import add_router
from tests.msfp.layers.execution.test_definition import (
    DTYPES,
    LAYERS,
    inputs_of,
    needs_integer_units,
    sums_of,
    trainable,
)

NAMES = [name for name in LAYERS if name not in ("grouped", "by channel")]
RANK = 3


def branched(name="conv2d", zero=100, scale=2.0, adapters=0):
    """A trainable layer with a random branch in 8 bits."""
    torch.manual_seed(0)
    layer = trainable(LAYERS[name]())
    own = torch.tensor(scale)
    shift = -zero * (own * INPUT_FORMAT.step)
    layer.branch_input = Quantizer(INPUT_FORMAT, own, shift)
    several = (adapters,) if adapters else ()
    rows, columns = layer.weight.flatten(1).shape
    layer.branch_down = nn.Parameter(torch.randn(*several, RANK, columns), requires_grad=False)
    layer.branch_up = nn.Parameter(torch.randn(*several, rows, RANK), requires_grad=False)
    return layer


def squeezed(layer, x, down):
    """The output of the first factor: sums in Python's integers, one rounding per operation."""
    inputs = layer.branch_input
    zero = round(-float(inputs.zero_point) / (float(inputs.scale) * INPUT_FORMAT.step))
    if layer.kind.places and layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    n = encode_steps(x.float(), INPUT_FORMAT, inputs.scale, inputs.zero_point).long() - zero
    if layer.kind.places and layer.padding_mode == "zeros":
        n = F.pad(n, layer._reversed_padding_repeated_twice)
    rows = down.float().numpy()
    steps = np.abs(rows).max(axis=1) / np.float32(127)
    m = np.rint(rows / steps[:, None]).astype(int).astype(object)
    m = m.reshape(RANK, *layer.weight.shape[1:])
    sums = sums_of(layer, n.numpy().astype(object), m)
    axis = layer.kind.channel_axis(torch.empty(sums.shape))
    row = tuple(-1 if place == axis else 1 for place in range(sums.ndim))
    step = np.float32(inputs.scale) * np.float32(INPUT_FORMAT.step)
    y = sums.astype(np.float64).astype(np.float32) * step * steps.reshape(row)
    return torch.from_numpy(y).to(x.dtype)


def outputs(factor, x):
    """The output of every back end, by name."""
    found = {}
    with torch.no_grad():
        with backends.floats_only():
            found["floats"] = backends.product(factor, x, 0)
        if OneDNN().takes(factor, x):
            found["integers"] = OneDNN().product(factor, x, 0)
    return found


def checked(layer, x):
    """Compare all back ends with the definition."""
    factor = BranchFactor(
        layer, layer.kind, layer.branch_down.to(x.dtype), layer.branch_input, keeps=True
    )
    expected = squeezed(layer, x, layer.branch_down.to(x.dtype))
    found = outputs(factor, x)
    assert all(torch.equal(y, expected) for y in found.values())
    return found


@needs_integer_units
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_first_factor_gives_the_defined_bits(name, dtype):
    layer = branched(name)
    assert set(checked(layer, inputs_of(layer, spread=60.0).to(dtype))) == {"floats", "integers"}


@needs_integer_units
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 255), st.floats(0.01, 50.0), st.integers(0, 99))
def test_zero_points_reach_over_the_whole_format(name, zero, scale, seed):
    layer = branched(name, zero, scale)
    checked(layer, inputs_of(layer, seed, spread=90.0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_layers_give_the_bits_of_trainable_ones_on_every_path(name, dtype):
    layer = branched(name).to(dtype)
    packed, x = copy.deepcopy(layer).pack(), inputs_of(layer, spread=60.0).to(dtype)
    assert packed.formats.branch_input == INPUT_FORMAT
    with torch.no_grad():
        expected = packed(x)
        factor = squeezed(layer, x, layer.branch_down)
        plain = layer.product(x) + layer.kind.mix(factor, layer.branch_up)
        torch.testing.assert_close(expected, plain, rtol=1e-2, atol=1e-1)
        with backends.floats_only():
            assert torch.equal(packed(x), expected)
            assert torch.equal(layer(x), expected)
    packed.cache_weight(False)
    with torch.no_grad():
        assert torch.equal(packed(x), expected)
    with torch.enable_grad():
        assert torch.equal(layer(x), expected)


def test_triton_kernels_give_the_defined_bits():
    pytest.importorskip("triton", reason="Triton is not installed")
    path = TritonPath("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("linear", "conv2d", "strided"):
        layer = branched(name)
        x = inputs_of(layer, spread=60.0)
        factor = BranchFactor(layer, layer.kind, layer.branch_down, layer.branch_input, keeps=False)
        expected = squeezed(layer, x, layer.branch_down)
        with torch.no_grad():
            if torch.cuda.is_available():
                layer.cuda()
                factor = BranchFactor(
                    layer, layer.kind, layer.branch_down, layer.branch_input, keeps=False
                )
                x = x.cuda()
            assert path.takes(factor, x)
            assert torch.equal(path.product(factor, x, 0).cpu(), expected)


def test_a_row_of_zeros_or_of_subnormal_numbers_is_no_fault():
    layer = branched("linear")
    layer.branch_down.data[0] = 0
    layer.branch_down.data[1] = torch.linspace(-3e-43, 3e-43, layer.branch_down.shape[1])
    factor = BranchFactor(layer, layer.kind, layer.branch_down, layer.branch_input, keeps=False)
    steps = factor.weight_steps(0)
    assert not steps[0].any()
    assert steps.abs().amax() == FACTOR_FORMAT.max_steps
    assert outputs(factor, inputs_of(layer))["floats"].isfinite().all()


def test_nan_stays_nan():
    packed = branched().pack()
    x = inputs_of(packed)
    x[0, 0, 2, 2] = torch.nan
    with torch.no_grad():
        y = packed(x)
    assert y[0].isnan().any()
    assert not y[1].isnan().any()


def test_samples_of_several_branches_each_get_their_own():
    layer = branched("linear", adapters=2)
    packed = layer.pack()
    network = nn.Sequential(packed)
    add_router(network, SegmentRouter(1, 2, torch.tensor([500.0])))
    x = inputs_of(layer, spread=60.0)
    ones = []
    for adapter in range(2):
        one = branched("linear")
        one.branch_down.data, one.branch_up.data = (
            factor.data[adapter].clone() for factor in (layer.branch_down, layer.branch_up)
        )
        ones.append(one.pack()(x))
    packed.routing.winners = torch.tensor([[0], [1], [0]])
    with torch.no_grad():
        y = packed(x)
    torch.testing.assert_close(y, torch.stack([ones[0][0], ones[1][1], ones[0][2]]))


def test_what_is_kept_is_made_anew_when_the_branch_changes():
    packed, other = branched("linear").pack(), branched("linear", zero=30).pack()
    x = inputs_of(packed, spread=60.0)
    with torch.no_grad():
        first = packed(x)
        kept = packed._factors[0]
        assert torch.equal(packed(x), first)
        assert packed._factors[0] is kept
        for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):  # noqa: S301
            assert not copied._factors
            assert torch.equal(copied(x), first)
        packed.load_state_dict(other.state_dict())
        assert torch.equal(packed(x), other(x))
        packed.branch_down.mul_(2)
        twice = packed(x)
        assert not torch.equal(twice, other(x))
        packed.branch_down = nn.Parameter(packed.branch_down / 2, requires_grad=False)
        assert torch.equal(packed(x), other(x))
        half = copy.deepcopy(other).half()
        assert torch.equal(other.half()(x.half()), half(x.half()))


def test_gradients_pass_both_factors_and_the_input():
    layer = branched("linear", scale=9.0)
    for factor in (layer.branch_down, layer.branch_up):
        factor.requires_grad_(True)
    x = inputs_of(layer).requires_grad_()
    layer(x).square().sum().backward()
    down, up = layer.branch_down.grad.clone(), layer.branch_up.grad.clone()
    layer.branch_down.grad = layer.branch_up.grad = None
    layer.branch_input = None
    layer(x).square().sum().backward()
    for mine, exact in ((down, layer.branch_down.grad), (up, layer.branch_up.grad)):
        assert F.cosine_similarity(mine.flatten(), exact.flatten(), dim=0) > 0.99


@needs_integer_units
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_compiling_without_a_graph_break_gives_the_defined_bits(name):
    layer = branched(name).pack().requires_grad_(False)
    x = inputs_of(layer, spread=60.0)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(nn.Sequential(layer), fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("adapters", [1, 2])
def test_loras_beside_a_branch_in_8_bits_are_packed_to_the_same_bits(adapters):
    layer = branched("conv2d")
    rows, columns = layer.weight.flatten(1).shape
    draw = torch.Generator().manual_seed(2)
    layer.hub = LoRAHub(rows, columns, adapters, 2, torch.tensor(0.1), draw, beside=True)
    layer.hub.up.data.normal_(generator=draw)
    if adapters > 1:
        add_router(nn.Sequential(layer), SegmentRouter(1, adapters, torch.tensor([500.0])))
        layer.routing.winners = torch.tensor([[0], [1]])
    x = inputs_of(layer, spread=60.0)
    with torch.no_grad():
        expected = layer(x)
        packed = layer.pack()
        packed.routing, packed.index = layer.routing, layer.index
        assert packed.formats.branch_input == INPUT_FORMAT
        assert torch.equal(packed(x), expected)
