"""The defined product, against its definition in Python's integers and single roundings."""

import copy
import itertools
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fpformats import encode_steps, parse
from msfp.layers.execution import backends, float_path, operators
from msfp.layers.execution.grids import IntegerGrids, whole_steps
from msfp.layers.execution.onednn import OneDNN
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.families import family_of

needs_integer_units = pytest.mark.skipif(
    operators.fuses(wide=False) is None, reason="torch has no integer operators here"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIGNED = ["E1M2", "E2M1", "E3M0", "E2M2"]
UNSIGNED = ["E1M3U", "E2M2U", "E3M1U", "E2M3U"]
WIDE = ["E1M6", "E0M7"]
LAYERS = {
    "linear": lambda: nn.Linear(12, 6),
    "linear without bias": lambda: nn.Linear(12, 6, bias=False),
    "conv1d": lambda: nn.Conv1d(12, 6, 3, padding=2, dilation=2),
    "conv2d": lambda: nn.Conv2d(12, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(12, 6, (3, 2), stride=(2, 1), padding=(0, 2)),
    "grouped": lambda: nn.Conv2d(12, 6, 3, padding=1, groups=3),
    "by channel": lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12),
    "uneven padding": lambda: nn.Conv2d(12, 6, (3, 2), padding="same"),
    "reflecting": lambda: nn.Conv2d(12, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv1d(12, 6, 3, padding=1, padding_mode="circular"),
    "conv3d": lambda: nn.Conv3d(12, 6, (1, 3, 2), padding=(0, 1, 1)),
}
SHAPES = {nn.Linear: (3, 12), nn.Conv1d: (3, 12, 9), nn.Conv2d: (2, 12, 6, 7),
          nn.Conv3d: (2, 12, 3, 4, 5)}  # fmt: skip


def inputs_of(plain, seed=1, spread=2.0):
    draw = torch.Generator().manual_seed(seed)
    kind = next(kind for kind in SHAPES if isinstance(plain, kind))
    return torch.randn(SHAPES[kind], generator=draw) * spread


def trainable(plain, weight="E2M1", inputs="E2M2U", scale=0.23, zero=5):
    """A layer with whole zero points, and searched-looking scales."""
    fmt, own = parse(inputs), parse(weight)
    rows = plain.weight.detach().flatten(1).abs().amax(dim=1) / float(own.max)
    row = (-1, *(1,) * (plain.weight.dim() - 1))
    scale = torch.tensor(scale)
    shift = None if fmt.signed else -zero * (scale * fmt.step)
    quantizers = Quantizer(own, rows.view(row)), Quantizer(fmt, scale, shift)
    return family_of(plain).trainable.wrap(plain, *quantizers)


def packed(name="conv2d", **options):
    torch.manual_seed(0)
    return trainable(LAYERS[name](), **options).pack()


def by_definition(layer, x):
    """The output for a batch: sums in Python's integers, then one rounding for each operation."""
    weights, inputs = layer.quantizers()
    scale = float(inputs.scale)
    zero = (
        0
        if inputs.zero_point is None
        else round(-float(inputs.zero_point) / (scale * inputs.format.step))
    )
    if layer.kind.places and layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    shift = None if inputs.zero_point is None else inputs.zero_point
    n = encode_steps(x.float(), inputs.format, inputs.scale, shift).long()
    n = n - (128 if inputs.format.signed else zero)
    m = encode_steps(
        layer.quantized_weight(dtype=torch.float32), weights.format, weights.scale, dtype="int8"
    ).long()  # fmt: skip
    if layer.kind.places and layer.padding_mode == "zeros":
        n = F.pad(n, layer._reversed_padding_repeated_twice)
    sums = sums_of(layer, n.numpy().astype(object), m.numpy().astype(object))
    step = np.float32(scale) * np.float32(inputs.format.step)
    steps = weights.scale.flatten().numpy() * np.float32(weights.format.step)
    axis = layer.kind.channel_axis(torch.empty(sums.shape))
    row = tuple(-1 if place == axis else 1 for place in range(sums.ndim))
    y = sums.astype(np.float64).astype(np.float32) * step * steps.reshape(row)
    if layer.bias is not None:
        y = y + layer.bias.detach().float().numpy().reshape(row)
    return torch.from_numpy(y).to(x.dtype)


def sums_of(layer, n, m):
    """The exact sums of products, element by element."""
    if not layer.kind.places:
        return n @ m.T
    places, groups = layer.kind.places, layer.groups
    kernel = [layer.dilation[a] * (layer.kernel_size[a] - 1) + 1 for a in range(places)]
    sizes = [
        (n.shape[2 + a] - kernel[a]) // layer.stride[a] + 1 for a in range(places)
    ]  # fmt: skip
    out = np.zeros((len(n), len(m), *sizes), dtype=object)
    inner, outer = n.shape[1] // groups, len(m) // groups
    for place in itertools.product(*map(range, sizes)):
        window = tuple(
            slice(p * layer.stride[a], p * layer.stride[a] + kernel[a], layer.dilation[a])
            for a, p in enumerate(place)
        )
        for group in range(groups):
            rows = slice(group * outer, (group + 1) * outer)
            read = n[(slice(None), slice(group * inner, (group + 1) * inner), *window)]
            flat = read.reshape(len(n), -1)
            out[(slice(None), rows, *place)] = flat @ m[rows].reshape(outer, -1).T
    return out


def outputs(layer, x):
    """The output of every back end, by name."""
    found = {}
    with torch.no_grad():
        with backends.floats_only():
            found["floats"] = layer(x)
        if OneDNN().takes(layer, x):
            found["integers"] = OneDNN().product(layer, x, 0)
    # None stands for a shape that the operators compute wrongly, which is then computed in floats.
    return {name: y for name, y in found.items() if y is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", ["E2M1", "E2M2U"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_gives_the_defined_bits(name, inputs, dtype):
    layer = packed(name, inputs=inputs).to(dtype)
    x = inputs_of(layer).to(dtype)
    found = outputs(layer, x)
    assert ("integers" in found) == (operators.fuses(wide=False) is not None)
    for y in found.values():
        assert y.dtype == dtype
        assert torch.equal(y, by_definition(layer, x))
    assert len({y.stride() for y in found.values()}) == 1 or layer.kind.places == 1


@pytest.mark.parametrize("inputs", [*SIGNED, *UNSIGNED, *WIDE])
@pytest.mark.parametrize("weight", [*SIGNED, *WIDE])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_every_format_that_fits_a_byte_gives_the_defined_bits(name, weight, inputs):
    layer = packed(name, weight=weight, inputs=inputs)
    grids = layer.integer_grids
    assert isinstance(grids, IntegerGrids)
    x = inputs_of(layer)
    found = outputs(layer, x)
    assert ("integers" in found) == OneDNN().runs(grids, x.device)
    for y in found.values():
        assert torch.equal(y, by_definition(layer, x))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    places=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    width=st.integers(1, 5),
    rows=st.integers(1, 4),
    batch=st.integers(1, 3),
    signed=st.booleans(),
    bias=st.booleans(),
)
def test_convolutions_of_any_shape_give_the_defined_bits(
    data, places, groups, width, rows, batch, signed, bias
):
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(places))
    dilation = tuple(data.draw(st.integers(1, 2)) for _ in range(places))
    moves = {
        "kernel_size": kernel,
        "dilation": dilation,
        "stride": tuple(data.draw(st.integers(1, 2)) for _ in range(places)),
        "padding": tuple(data.draw(st.integers(0, 2)) for _ in range(places)),
    }
    torch.manual_seed(data.draw(st.integers(0, 9)))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[places - 1]
    plain = kind(width * groups, rows * groups, groups=groups, bias=bias, **moves)
    zero = data.draw(st.integers(0, 28))
    layer = trainable(plain, inputs="E2M1" if signed else "E2M2U", zero=zero).pack()
    sizes = [
        dilation[place] * (kernel[place] - 1) + data.draw(st.integers(1, 4))
        for place in range(places)
    ]
    x = torch.randn(batch, width * groups, *sizes) * 3
    if data.draw(st.booleans()):
        x = layer.kind.channels_last(x)
    for y in outputs(layer, x).values():
        assert torch.equal(y, by_definition(layer, x))


@needs_integer_units
def test_inputs_of_any_strides_give_the_defined_bits():
    layer = packed("conv2d")
    x = torch.randn(4, 12, 9, 14, generator=torch.Generator().manual_seed(0))
    for view in (x, x.to(memory_format=torch.channels_last), x[::2], x[..., ::2], x.flip(3),
                 x.transpose(2, 3), x[:1].expand(3, -1, -1, -1)):  # fmt: skip
        found = outputs(layer, view)
        assert torch.equal(found["integers"], found["floats"])
        assert torch.equal(found["floats"], by_definition(layer, view.contiguous()))
    layer = packed("linear")
    for view in (torch.randn(12), torch.randn(2, 3, 12), torch.randn(12, 5).T):
        found = outputs(layer, view)
        assert torch.equal(found["integers"], found["floats"])


@pytest.mark.parametrize("name", LAYERS)
def test_trainable_layers_give_the_bits_of_packed_ones(name):
    torch.manual_seed(0)
    layer = trainable(LAYERS[name]())
    x = inputs_of(layer)
    expected = by_definition(layer.pack(), x)
    assert torch.equal(layer(x), expected)  # with a gradient
    assert torch.equal(outputs(layer, x)["floats"], expected)
    many = x[:1].expand(600, *x.shape[1:])
    found = outputs(layer, many)
    assert ("integers" in found) == (operators.fuses(wide=False) is not None)
    for y in found.values():
        assert torch.equal(y, outputs(layer.pack(), many)["floats"])


@pytest.mark.parametrize("inputs", ["E2M1", "E2M2U"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_dequantized_operands(name, inputs, monkeypatch):
    torch.manual_seed(0)
    layer = trainable(LAYERS[name](), inputs=inputs)
    x = inputs_of(layer).requires_grad_()
    learned = [x, *(each.requires_grad_() for each in layer.parameters())]
    y = layer(x)
    given = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(y, learned, given)
    monkeypatch.setattr(float_path, "is_defined", lambda *_: False)
    expected = torch.autograd.grad(layer(x), learned, given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1000, 3000, 20_000])
def test_sums_beyond_the_exact_floats_are_taken_apart(width):
    plain = nn.Linear(width, 3)
    layer = trainable(plain, weight="E1M6", inputs="E1M6", scale=1 / 64).pack()
    assert layer.integer_grids.digits == {1000: 1, 3000: 2, 20_000: 4}[width]
    x = torch.full((2, width), 9.0)  # all at the largest value, so that sums are largest
    x[1] = inputs_of(nn.Linear(12, 1)).flatten().repeat(width)[:width]
    layer.codes[: width // 2] = 127
    for y in outputs(layer, x).values():
        assert torch.equal(y, by_definition(layer, x))


def test_sums_that_an_int32_may_not_hold_have_no_definition():
    layer = trainable(nn.Linear(70_000, 1), weight="E1M6", inputs="E1M6").pack()
    assert layer.integer_grids == (
        "its sums have 70000 products, which may be too much for an int32"
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"inputs": "E4M0U"}, "E4M0U has up to 16384 steps, which is more than a byte"),
        ({"weight": "E3M2"}, "E3M2 has up to 448 steps, which is more than a byte"),
        ({"zero": 2.5}, "its zero point is not a whole number of steps"),
        ({"zero": 29}, "its zero point is not a whole number of steps"),
        ({"zero": -1}, "its zero point is not a whole number of steps"),
    ],
)
def test_a_layer_without_a_definition_says_why_and_runs_in_floats(options, why):
    layer = packed("linear", **options)
    assert layer.integer_grids == why
    x = inputs_of(layer)
    assert not OneDNN().takes(layer, x)
    weight = layer.quantized_weight()
    assert torch.equal(layer(x), F.linear(layer.quantize_input(x), weight, layer.bias))


def split(plain):
    """A layer whose input has two scales, for 5 and for 7 channels."""
    layer = trainable(plain, inputs="E2M1")
    scale = torch.tensor([0.2] * 5 + [0.7] * 7).view(-1, *(1,) * layer.kind.places)
    layer.input_quantizer = Quantizer(parse("E2M1"), scale)
    return layer


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "uneven padding"])
def test_a_split_input_gives_the_sum_of_its_parts(name):
    torch.manual_seed(0)
    layer = split(LAYERS[name]())
    x = inputs_of(layer)
    axis = layer.kind.channel_axis(x)
    total = None
    for part, (start, stop) in enumerate(((0, 5), (5, 12))):
        own = trainable(LAYERS[name](), inputs="E2M1", scale=(0.2, 0.7)[part])
        own.weight = nn.Parameter(layer.weight.detach().clone())
        own.weight_quantizer = layer.weight_quantizer
        own.bias = layer.bias if part == 0 else None
        weight = own.weight.data
        weight[:, :start], weight[:, stop:] = 0, 0
        own.input_quantizer.scale.data.fill_((0.2, 0.7)[part])
        y = by_definition(own.pack(), x)
        total = y if total is None else total + y
    assert x.shape[axis] == 12
    for each in (layer, layer.pack()):
        for y in outputs(each, x).values():
            assert torch.equal(y, total)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_nan_stays_nan_and_infinities_are_clipped(name, value):
    layer = packed(name)
    x = inputs_of(layer)
    x.view(-1)[3] = value
    with torch.no_grad():
        y = layer(x)
        with backends.floats_only():
            assert torch.equal(y.nan_to_num(99), layer(x).nan_to_num(99))
    if math.isnan(value):
        assert y.isnan().any()
        assert not y.isnan().all()
    else:
        x.view(-1)[3] = math.copysign(1e30, value)
        assert torch.equal(y, layer(x))


@needs_integer_units
def test_empty_batches_and_inputs_without_a_batch_run():
    for name in ("linear", "conv2d"):
        layer = packed(name)
        with torch.no_grad():
            assert layer(inputs_of(layer)[:0]).shape[0] == 0
    one = inputs_of(layer)[0]
    assert torch.equal(layer(one), layer(one[None])[0])


@needs_integer_units
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        layer = packed("conv2d")
        x = inputs_of(layer).repeat(8, 1, 4, 4)
        found = outputs(layer, x)
        assert torch.equal(found["integers"], found["floats"])
    finally:
        torch.set_num_threads(before)


@needs_integer_units
def test_what_is_kept_is_made_anew_when_the_layer_changes():
    layer, other = packed("conv2d"), packed("conv2d", scale=0.4)
    x = inputs_of(layer)
    with torch.no_grad():
        first = layer(x)
        assert layer.kept()
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
            assert not copied._kept
            assert torch.equal(copied(x), first)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        layer.input_scale.copy_(torch.tensor(0.1).view(torch.int32))
        layer.input_zero_point.zero_()
        assert torch.equal(layer(x), by_definition(layer, x))
        layer.codes = nn.Parameter(layer.codes.flip(0), requires_grad=False)
        assert torch.equal(layer(x), by_definition(layer, x))
        kept = layer.kept()
        layer.half()
        assert layer.kept() is kept  # casts do not change codes and scales
        assert torch.equal(layer(x.half()), by_definition(layer, x.half()))
        layer.bfloat16().float()
        assert not layer.to("meta")._kept
        layer = copy.deepcopy(other)
        layer.cache_weight(False)
        assert torch.equal(layer(x), by_definition(layer, x))
        assert OneDNN not in layer.kept()


@needs_integer_units
def test_inputs_that_need_a_gradient_run_in_floats():
    layer = packed("conv2d")
    layer.bias.requires_grad_(False)
    x = inputs_of(layer)
    assert OneDNN().takes(layer, x)
    assert not OneDNN().takes(layer, x.clone().requires_grad_())
    layer.bias.requires_grad_(True)
    assert not OneDNN().takes(layer, x)
    with torch.no_grad():
        assert OneDNN().takes(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not OneDNN().takes(layer, x)
        assert layer(x).dtype == torch.bfloat16


@needs_integer_units
def test_the_operators_can_be_switched_off():
    layer = packed("conv2d")
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        assert not OneDNN().takes(layer, inputs_of(layer))


def test_other_bits_are_noticed_once_and_products_are_computed_in_floats(monkeypatch):
    layer = packed("conv2d")
    monkeypatch.setattr(operators.LargeProduct, "__call__", lambda *_: torch.zeros(()))
    operators._checked.cache_clear()
    try:
        with pytest.warns(UserWarning, match="are computed in floating point: the integer operat"):
            assert not OneDNN().runs(layer.integer_grids, torch.device("cpu"))
        assert torch.equal(layer(inputs_of(layer)), by_definition(layer, inputs_of(layer)))
    finally:
        operators._checked.cache_clear()


CHECK = """
import sys
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", sys.argv[1], "-k", sys.argv[2]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["SSE41", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_older_processors_give_the_same_bits(limit):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": limit}
    chosen = "defined_bits or packed_ones or parts or floats_are_taken"
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-c", CHECK, __file__, chosen],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]


@needs_integer_units
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv1d", "grouped"])
def test_compiling_without_a_graph_break_gives_the_defined_bits(name):
    layer = packed(name).requires_grad_(False)
    network = nn.Sequential(nn.ReLU(), layer, nn.ReLU())
    x = inputs_of(layer)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, dynamic=False)
        assert torch.equal(compiled(x), by_definition(layer, x.relu()).relu())
        x.view(-1)[0] = math.nan
        nan = compiled(x).isnan()
        assert nan.any() if name == "conv1d" else nan.all()


def test_a_learned_zero_point_stays_a_whole_number_of_steps():
    quantizer = Quantizer(parse("E2M2U"), torch.tensor(0.2), torch.tensor(-3 * 0.05))
    assert quantizer.whole
    assert quantizer.shift is quantizer.zero_point
    for parameter in quantizer.parameters():
        parameter.requires_grad_()
    with torch.no_grad():
        quantizer.scale.fill_(0.24)
        quantizer.zero_point.fill_(-0.2)  # 3.33 steps of 0.06
    assert quantizer.shift.item() == pytest.approx(-0.18)
    assert whole_steps(quantizer.format, quantizer.scale, quantizer.shift) == 3
    x = torch.linspace(-1, 3, 200)
    steps = quantizer.steps(x)
    assert torch.equal(steps, steps.round())
    gradients = torch.autograd.grad(quantizer(x).sum(), [*quantizer.parameters()])
    assert all(gradient.item() for gradient in gradients)
    with torch.no_grad():
        quantizer.zero_point.fill_(5.0)  # beyond what the format reaches
    assert quantizer.shift.item() == 0


def test_a_zero_point_of_an_older_checkpoint_stays_as_it_is():
    quantizer = Quantizer(parse("E2M2U"), torch.tensor(0.2), torch.tensor(-0.16))
    for parameter in quantizer.parameters():
        parameter.requires_grad_()
    assert not quantizer.whole
    assert quantizer.shift is quantizer.zero_point


@needs_integer_units
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_a_wrong_number_of_channels_is_refused_as_torch_does(name):
    layer = packed(name)
    x = inputs_of(layer)
    axis = layer.kind.channel_axis(x)
    for width in (3, 11):
        wrong = x.narrow(axis, 0, width)
        assert not OneDNN().takes(layer, wrong)
        with torch.no_grad(), pytest.raises(RuntimeError):
            layer(wrong)


@pytest.mark.parametrize("places", [2, 3])
def test_one_channel_that_is_last_in_memory_gives_the_defined_bits(places):
    kind = (nn.Conv2d, nn.Conv3d)[places - 2]
    last = (torch.channels_last, torch.channels_last_3d)[places - 2]
    layer = trainable(kind(1, 1, 3, stride=2, bias=False), inputs="E2M2U").pack()
    x = (torch.randn(2, 1, *(4,) * (places - 1), 3) * 3).clone(memory_format=last)
    for y in outputs(layer, x).values():
        assert torch.equal(y, by_definition(layer, x))


@pytest.mark.parametrize("zero", [0, 3, 128])
@pytest.mark.parametrize("places", range(4))
def test_sums_of_more_than_24_bits_are_rounded_once_or_left_to_floats(places, zero):
    inputs = 3072 if not places else 3072 // 3**places
    convolution = None
    if places:
        ones = (1,) * places
        convolution = operators.Convolution(ones, (0,) * places, ones, 1)
    weight = torch.randint(100, 128, (4, inputs, *(3,) * places), dtype=torch.int8)
    x = torch.randint(200, 256, (5, inputs, *(3,) * places), dtype=torch.uint8)
    operands = operators.Operands(weight, torch.rand(4) + 0.5, 0.3, zero)
    n, m = (each.flatten(1).double() for each in (x, weight))
    sums = (n - zero) @ m.T
    assert sums.max() > 2**24
    wanted = sums.float() * torch.tensor(0.3) * operands.step
    multiply = operators.checked_product(
        operands, tuple(x.shape), convolution, largest=255, wide=True
    )
    if multiply is None:
        adds_floats = places and zero and not operators.has_long_sums()
        assert adds_floats or operators.fuses(wide=True) is None
    else:
        assert torch.equal(multiply(x, None, torch.float32).view(5, 4), wanted)
