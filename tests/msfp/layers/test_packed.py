import copy

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import nn
from torch.utils.checkpoint import checkpoint

from fpformats import E2M1, E2M2U, E3M2, FloatFormat, Specials, decode, quantize_scaled, unpack
from msfp import InputError, QuantConv1d, QuantConv2d, QuantLinear, cache_weights, pack
from msfp.layers.base import quantized_layers
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.families import FAMILIES, TrainableConv2d, TrainableLinear, family_of
from msfp.layers.selection import replace_layers

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYERS = {
    "linear": lambda: nn.Linear(12, 6),
    "linear without bias": lambda: nn.Linear(12, 6, bias=False),
    "conv1d": lambda: nn.Conv1d(12, 6, 3, padding=2, dilation=2),
    "conv2d": lambda: nn.Conv2d(12, 6, 3, padding=1),
    "strided, grouped": lambda: nn.Conv2d(12, 6, 3, stride=2, padding=1, groups=2),
    "padded as stated": lambda: nn.Conv2d(12, 6, (3, 2), padding="same"),
    "reflecting": lambda: nn.Conv2d(12, 6, 3, padding=1, padding_mode="reflect"),
}


def inputs_of(layer, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    shape = {nn.Linear: (3, 12), nn.Conv1d: (3, 12, 9), nn.Conv2d: (3, 12, 8, 8)}
    kind = next(kind for kind in shape if isinstance(layer, kind))
    return (torch.randn(shape[kind], generator=draw) * 2).sigmoid().mul(3).sub(0.25).to(dtype)


def trainable(plain, input_format=E2M2U):
    rows = plain.weight.detach().flatten(1).abs().amax(dim=1) / 6
    scale = rows.view(-1, *(1,) * (plain.weight.dim() - 1))
    inputs = None
    if input_format is not None:
        zero = None if input_format.signed else torch.tensor(-0.27)
        inputs = Quantizer(input_format, torch.tensor(0.23), zero)
    return family_of(plain).trainable.wrap(plain, Quantizer(E2M1, scale), inputs)


def packed(name, input_format=E2M2U):
    torch.manual_seed(0)
    return trainable(LAYERS[name](), input_format).pack()


def float_scale(layer):
    scale = layer.weight_scale.view(torch.float32)
    return scale.view(-1, *(1,) * (len(layer.weight_shape) - 1))


def plain_counterpart(layer, weight, dtype):
    """A plain layer with the attributes of a quantized one."""
    kind = next(plain for plain, family in FAMILIES.items() if type(layer) is family.packed)
    plain = kind.__new__(kind)
    plain.__dict__.update(vars(layer))
    plain._parameters, plain._buffers = {}, {}
    plain.weight = nn.Parameter(weight)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype))
    return plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_plain_one_on_rounded_inputs_and_weights(name, dtype):
    """Padding included: the plain layer pads the rounded input with true zeros."""
    layer = packed(name).to(dtype)
    x = inputs_of(layer, dtype)
    rounded = quantize_scaled(x, E2M2U, torch.tensor(0.23), torch.tensor(-0.27))
    codes = unpack(layer.codes, 4, shape=tuple(layer.weight_shape))
    weight = (decode(codes, E2M1) * float_scale(layer)).to(dtype)
    plain = plain_counterpart(layer, weight, dtype)
    assert rounded.dtype == dtype
    assert torch.equal(layer(x), plain(rounded))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_without_an_input_format_takes_its_input_as_it_is(name):
    layer = packed(name, input_format=None)
    plain = plain_counterpart(layer, layer.quantized_weight(), torch.float32)
    assert torch.equal(layer(inputs_of(layer)), plain(inputs_of(layer)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_packing_keeps_outputs_bit_for_bit(name, dtype):
    torch.manual_seed(0)
    layer = trainable(LAYERS[name]()).to(dtype)
    x = inputs_of(layer, dtype)
    assert torch.equal(layer.pack()(x), layer(x))


def test_the_border_of_a_padded_convolution_sees_zeros_and_not_the_zero_point():
    layer = packed("conv2d")
    x = torch.zeros(1, 12, 4, 4)
    rounded = layer.quantize_input(x)
    assert rounded.unique().numel() == 1
    assert rounded.max() != 0  # this format does not have 0 in its reach
    by_hand = F.conv2d(F.pad(rounded, (1, 1, 1, 1)), layer.quantized_weight(), layer.bias)
    assert torch.equal(layer(x), by_hand)


def test_a_packed_layer_holds_codes_scales_and_bias_and_nothing_else():
    state = packed("conv2d").state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "bias": (torch.float32, (6,)),
        "codes": (torch.uint8, (6 * 12 * 9 // 2,)),
        "weight_scale": (torch.int32, (6,)),
        "input_scale": (torch.int32, ()),
        "input_zero_point": (torch.int32, ()),
    }
    assert "input_zero_point" not in packed("conv2d", E3M2).state_dict()
    assert "input_scale" not in packed("conv2d", None).state_dict()


@pytest.mark.parametrize("bits", range(3, 9))
def test_adapters_of_any_width_and_number_of_weights_are_packed_each_from_a_new_byte(bits):
    plain = nn.Conv1d(3, 5, 3)  # 45 weights: the last byte of an adapter is not full
    fmt = FloatFormat(2, bits - 3, specials=Specials.FINITE_ONLY)
    scale = torch.linspace(0.01, 0.1, 5).view(5, 1, 1)
    weights = [torch.randn(5, 3, 3) for _ in range(3)]
    layer = QuantConv1d.of_weights(plain, weights, Quantizer(fmt, scale), None)
    assert layer.codes.shape == (3 * -(-45 * bits // 8),)
    layer_again = copy.deepcopy(layer)
    layer_again.cache_weight(True)
    for adapter, weight in enumerate(weights):
        expected = quantize_scaled(weight, fmt, scale)
        assert torch.equal(layer.quantized_weight(adapter), expected)
        assert torch.equal(layer_again.quantized_weight(adapter), expected)


def test_casting_there_and_back_does_not_touch_codes_and_scales():
    layer = packed("conv2d")
    before = copy.deepcopy(layer)
    layer.half().bfloat16().float()
    for name in ("codes", "weight_scale", "input_scale", "input_zero_point"):
        assert torch.equal(getattr(layer, name), getattr(before, name))
    assert torch.equal(layer.quantized_weight(), before.quantized_weight())


def test_scales_of_a_trainable_layer_stay_float32():
    layer = trainable(nn.Linear(12, 6)).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight_quantizer.scale.dtype == torch.float32
    assert layer.input_quantizer.zero_point.dtype == torch.float32


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_weight_is_the_float32_product_rounded_once(dtype):
    layer = packed("linear").to(dtype)
    assert layer.weight.dtype == dtype
    exact = decode(unpack(layer.codes, 4, shape=(6, 12)), E2M1) * float_scale(layer)
    assert torch.equal(layer.weight, exact.to(dtype))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_weights_give_the_same_bits_also_after_a_cast(name, dtype):
    layer = packed(name)
    cached = copy.deepcopy(layer)
    cached.cache_weight(True)
    cached, layer = cached.half().to(dtype), layer.half().to(dtype)
    x = inputs_of(layer, dtype)
    assert cached.cache.dtype == dtype
    assert torch.equal(cached(x), layer(x))
    assert cached.state_dict().keys() == layer.state_dict().keys()


def test_the_cache_switch_works_on_a_whole_network():
    network = nn.Sequential(packed("conv2d"), nn.Flatten(2), nn.Linear(64, 4))
    cache_weights(network)
    assert network[0].cache.shape == (1, 6, 12, 3, 3)
    cache_weights(network, enabled=False)
    assert network[0].cache is None


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_computes_in_its_dtype_on_the_same_rounded_numbers(name, cached):
    layer = packed(name)
    layer.cache_weight(cached)
    x = inputs_of(layer)
    plain = plain_counterpart(layer, layer.quantized_weight(), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), plain(layer.quantize_input(x))
        again = layer(x.bfloat16())
    assert y.dtype == again.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    alike = plain_counterpart(layer, layer.quantized_weight(0, torch.bfloat16), torch.bfloat16)
    assert torch.equal(again, alike(layer.quantize_input(x.bfloat16())))


def test_channels_last_gives_the_same_values_in_that_order():
    layer = packed("conv2d")
    x = inputs_of(layer)
    y = layer(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, layer(x))
    assert layer.to(memory_format=torch.channels_last)(x).shape == y.shape


def test_gradients_pass_straight_through_a_packed_layer_also_when_checkpointed():
    layer = packed("conv2d")
    x = inputs_of(layer).requires_grad_(True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        run(x).square().sum().backward()
        gradients.append(x.grad)
        x.grad = None
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_gradients_pass_straight_through_both_quantizers(quantized):
    layer = quantized()[0].unet.mid_block.resnets[0].conv1
    layer.weight.requires_grad_(True)
    low = layer.input_quantizer.zero_point.item()
    x = torch.full((1, 96, 4, 4), low / 2, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="torch 2.8 cannot trace packed layers"
)
@pytest.mark.parametrize("cached", [False, True])
def test_compiling_without_a_graph_break_gives_the_same_bits(cached):
    torch.manual_seed(0)
    network = nn.Sequential(packed("conv2d"), nn.SiLU(), nn.Flatten(1), nn.Linear(384, 12))
    network.append(packed("linear"))
    cache_weights(network, enabled=cached)
    x = inputs_of(network[0])
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(network, fullgraph=True)(x), network(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_is_equal_and_apart(name):
    layer = packed(name)
    layer.cache_weight(True)
    twin = copy.deepcopy(layer)
    x = inputs_of(layer)
    before = layer(x)
    assert torch.equal(twin(x), before)
    twin.codes.fill_(0)
    twin.cache_weight(True)
    assert not torch.equal(twin(x), before)
    assert torch.equal(layer(x), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LAYERS)
def test_moving_to_a_device_and_back_keeps_every_bit(name):
    layer = packed(name)
    layer.cache_weight(True)
    moved = copy.deepcopy(layer).cuda()
    assert moved.cache.is_cuda
    assert torch.equal(moved.quantized_weight().cpu(), layer.quantized_weight())
    assert torch.equal(moved.quantize_input(inputs_of(layer).cuda()).cpu(),
                       layer.quantize_input(inputs_of(layer)))  # fmt: skip
    assert torch.equal(moved.cpu()(inputs_of(layer)), layer(inputs_of(layer)))


def test_moving_to_meta_drops_the_cache():
    layer = packed("linear")
    layer.cache_weight(True)
    assert layer.to("meta").cache is None


@pytest.mark.parametrize(
    ("kind", "plain_kind", "arguments"),
    [
        (QuantLinear, nn.Linear, (12, 6, False)),
        (QuantConv1d, nn.Conv1d, (12, 6, 3)),
        (QuantConv2d, nn.Conv2d, (12, 6, 3)),
    ],
)
def test_a_new_layer_is_a_plain_one_until_it_is_given_formats(kind, plain_kind, arguments):
    torch.manual_seed(0)
    new = kind(*arguments)
    torch.manual_seed(0)
    plain = plain_kind(*arguments)
    assert torch.equal(new.weight, plain.weight)
    assert torch.equal(new(inputs_of(plain)), plain(inputs_of(plain)))
    assert new.state_dict().keys() == plain.state_dict().keys()
    assert not quantized_layers(nn.Sequential(new))


@pytest.mark.parametrize("change", [
    lambda layer: layer.weight.data.add_(1),
    lambda layer: setattr(layer.weight, "data", torch.zeros(6, 12)),
])  # fmt: skip
def test_the_packed_weight_cannot_be_written_through(change):
    layer = packed("linear")
    before = layer.quantized_weight()
    with pytest.raises((InputError, AttributeError), match=r"packed|data"):
        change(layer)
    assert torch.equal(layer.quantized_weight(), before)


def test_every_conv_and_linear_is_swapped_and_stays_one(quantized, reference):
    plain = [m for m in reference.unet.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    unet = quantized()[0].unet
    for kinds in ((TrainableConv2d, TrainableLinear), (QuantConv2d, QuantLinear)):
        layers = quantized_layers(unet)
        assert len(layers) == len(plain) == 65
        assert all(isinstance(layer, kinds) for layer in layers.values())
        assert all(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in layers.values())
        pack(unet)


def test_packing_keeps_the_prediction_bit_for_bit(quantized):
    pipe, _ = quantized()
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        before = pipe.unet(x, 500).sample
        pack(pipe.unet)
        assert torch.equal(pipe.unet(x, 500).sample, before)


def test_a_layer_that_occurs_twice_is_replaced_twice():
    shared = nn.Linear(4, 4)
    network = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    replace_layers(network, {shared: trainable(shared)})
    assert isinstance(network["a"], TrainableLinear)
    assert network["b"][0] is network["a"]


@pytest.mark.parametrize("name", ["conv_in", "down_blocks.1.attentions.0.to_q"])
def test_repr_names_the_formats(quantized, name):
    pipe, layers = quantized()
    chosen = next(layer for layer in layers if layer.name == name)
    for _ in range(2):
        text = repr(pipe.unet.get_submodule(name))
        assert f"weight={chosen.weight_format}, input={chosen.input_format}" in text
        pack(pipe.unet)
