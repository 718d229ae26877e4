"""The defined product, against its definition in Python's integers and single roundings."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fpformats import encode_steps, parse
from msfp.layers.execution import backends, operators
from msfp.layers.execution.onednn import OneDNN
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.families import family_of

needs_integer_units = pytest.mark.skipif(
    not operators.agrees(wide=False), reason="torch has no integer operators here"
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


def rounded(number):
    return np.float32(number)


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
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", ["E2M1", "E2M2U"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_gives_the_defined_bits(name, inputs, dtype):
    layer = packed(name, inputs=inputs).to(dtype)
    x = inputs_of(layer).to(dtype)
    found = outputs(layer, x)
    assert ("integers" in found) == operators.agrees(wide=False)
    for y in found.values():
        assert y.dtype == dtype
        assert torch.equal(y, by_definition(layer, x))
    assert len({y.stride() for y in found.values()}) == 1 or layer.kind.places == 1
