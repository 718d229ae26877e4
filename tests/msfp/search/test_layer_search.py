import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fpformats import Histogram, quantize_scaled
from fpformats.fitting.search import RATIOS, ZERO_POINTS
from msfp import Calibration, InputError, QuantizationConfig, quantize
from msfp.search.layer_search import is_asymmetric, search_input
from msfp.search.schemes import float_formats, integer_formats
from msfp.support.decibels import sqnr
from msfp.support.hooks import hooked


def histogram_of(numbers):
    histogram = Histogram()
    histogram.update(numbers)
    return histogram


ACTIVATIONS = {"SiLU": F.silu, "GELU": F.gelu, "tanh GELU": partial(F.gelu, approximate="tanh")}


@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_unsigned_gains_three_decibels_after_silu_and_gelu(activation, sigma):
    normal = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    inputs = activation(sigma * normal)
    best, signed = search_input(histogram_of(inputs), 4, "mixup")
    signal = inputs.double().square().sum().item()
    assert not best.format.signed
    step = best.scale * best.format.step
    assert inputs.min() - step / 2 <= best.zero_point <= 0
    assert (best.zero_point / step).is_integer()
    assert sqnr(signal, best.squared_error) >= sqnr(signal, signed.squared_error) + 3


def brute_force(values, fmt, zero_points):
    """The least squared error by trying every clip at every zero point, one after the other."""
    low, high = float(values.min()), float(values.max())
    errors = []
    for zero in low * ZERO_POINTS if zero_points else [None]:
        reach = max(abs(low), abs(high)) if fmt.signed else high - (zero or 0)
        for ratio in RATIOS:
            scale = np.float32(reach * ratio / float(fmt.max))
            zero_point = None
            if zero is not None:
                step = np.float64(scale) * fmt.step
                zero_point = np.float32(np.round(zero / step) * step)
            rounded = quantize_scaled(values, fmt, scale, zero_point)
            errors.append(np.square(rounded.astype(np.float64) - values).sum())
    return min(errors)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_is_never_worse_than_trying_everything(bits):
    values = np.random.default_rng(2).standard_normal(60).astype(np.float32)
    values /= 1 + np.exp(-values)
    choice, _ = search_input(histogram_of(values), bits, "mixup")
    assert len(choice.by_format) == len(float_formats(bits, signed=True)) + len(
        float_formats(bits, signed=False)
    )
    tried = {fmt: brute_force(values, fmt, not fmt.signed) for fmt in choice.by_format}
    for fmt, best in choice.by_format.items():
        assert best.squared_error <= tried[fmt] * (1 + 1e-6)
    rounded = quantize_scaled(values, choice.format, choice.scale, choice.zero_point)
    error = np.square(rounded.astype(np.float64) - values).sum()
    assert error == pytest.approx(choice.squared_error, rel=1e-5)


@pytest.mark.parametrize("scheme", ["mixup", "signed", "int_minmax", "int_mse", "int_zero_point"])
@pytest.mark.parametrize("exponent", [-30, -3, 12])
def test_the_search_does_not_depend_on_the_unit(silu_inputs, scheme, exponent):
    for values in (silu_inputs, np.random.default_rng(0).standard_normal(5000).astype(np.float32)):
        here, _ = search_input(histogram_of(values), 4, scheme)
        there, _ = search_input(histogram_of(values * np.float32(2.0**exponent)), 4, scheme)
        assert there.format == here.format
        assert there.scale == here.scale * 2.0**exponent
        if here.zero_point is not None:
            assert there.zero_point == here.zero_point * 2.0**exponent


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("scheme", ["mixup", "int_zero_point"])
def test_each_further_bit_of_any_width_lowers_the_error(silu_inputs, bits, scheme):
    choice, _ = search_input(histogram_of(silu_inputs), bits, scheme)
    assert choice.format.bits == bits
    if bits > 3:
        fewer, _ = search_input(histogram_of(silu_inputs), bits - 1, scheme)
        assert choice.squared_error < fewer.squared_error / 2


def test_a_few_outliers_do_not_make_inputs_asymmetric():
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values[:20] = 30
    assert not is_asymmetric(histogram_of(values))
    assert is_asymmetric(histogram_of(np.abs(values)))
    assert not is_asymmetric(histogram_of(-np.abs(values)))
    assert not is_asymmetric(histogram_of(np.zeros(10, dtype=np.float32)))


def test_symmetric_inputs_stay_signed():
    normal = histogram_of(np.random.default_rng(1).standard_normal(10_000))
    best, signed = search_input(normal, 4, "mixup")
    assert best.squared_error == signed.squared_error
    assert best.format.signed
    assert not is_asymmetric(normal)


def test_the_signed_scheme_never_chooses_unsigned(silu_inputs):
    best, _ = search_input(histogram_of(silu_inputs), 4, "signed")
    assert best.format.signed


def test_a_searched_clip_is_never_worse_than_none(silu_inputs):
    searched, _ = search_input(histogram_of(silu_inputs), 4, "int_mse")
    plain, _ = search_input(histogram_of(silu_inputs), 4, "int_minmax")
    assert searched.squared_error < plain.squared_error
    (integers,) = integer_formats(4, signed=True)
    assert plain.scale == pytest.approx(silu_inputs.max() / float(integers.max))


def test_the_reported_error_is_that_of_the_swapped_quantizer(quantized, reference, sampler):
    """On the numbers themselves: layers whose whole input is drawn, so that they can be kept."""
    pipe, layers = quantized()
    few = {layer.name: [] for layer in layers if layer.name.endswith("time_emb_proj")}
    hooks = (
        reference.unet.get_submodule(name).register_forward_pre_hook(
            lambda _layer, args, name=name: few[name].append(args[0])
        )
        for name in few
    )
    with hooked(hooks):
        for call in sampler.calls(8, seed=1):
            call(reference)
    assert few
    for summary in layers:
        if summary.name in few:
            inputs = torch.cat(few[summary.name])
            quantizer = pipe.unet.get_submodule(summary.name).input_quantizer
            noise = (quantizer(inputs) - inputs).double().square().sum().item()
            signal = inputs.double().square().sum().item()
            assert sqnr(signal, noise) == pytest.approx(summary.input_sqnr, abs=1e-3)


def test_first_and_last_layer_have_their_own_width(quantized):
    pipe, _ = quantized(weight_bits=4, activation_bits=3, end_bits=6)
    for name, bits in [
        ("conv_in", (6, 6)),
        ("conv_out", (6, 6)),
        ("mid_block.resnets.0.conv1", (4, 3)),
    ]:
        layer = pipe.unet.get_submodule(name)
        assert (layer.weight_quantizer.format.bits, layer.input_quantizer.format.bits) == bits


def test_every_layer_after_silu_chooses_unsigned(quantized):
    _, layers = quantized()
    unsigned = {layer.name for layer in layers if layer.unsigned}
    assert unsigned == {layer.name for layer in layers if layer.asymmetric}
    after_silu = ("conv1", "conv2", "conv_out", "time_emb_proj", "time_embedding.linear_2")
    assert unsigned == {layer.name for layer in layers if layer.name.endswith(after_silu)}


def test_a_quantized_pipeline_is_not_quantized_again(quantized, calibration):
    pipe, _ = quantized()
    with pytest.raises(InputError, match="is quantized already"):
        quantize(pipe, QuantizationConfig(weight_bits=3), calibration=calibration)


def test_the_plain_layer_keeps_its_weight_when_its_counterpart_is_packed(quantized, reference):
    plain = copy.deepcopy(reference.unet.conv_in)
    layer = quantized()[0].unet.conv_in
    twin = type(layer).wrap(plain, layer.weight_quantizer, layer.input_quantizer)
    assert twin.weight is plain.weight
    twin.pack()
    assert torch.equal(plain.weight, reference.unet.conv_in.weight)


def test_integers_with_a_zero_point_lie_between_symmetric_ones_and_mixup(silu_inputs):
    errors = [
        search_input(histogram_of(silu_inputs), 4, scheme)[0].squared_error
        for scheme in ("int_minmax", "int_mse", "int_zero_point", "mixup")
    ]
    assert errors == sorted(errors, reverse=True)


def test_calibration_of_another_model_is_refused_and_nothing_is_swapped(reference):
    pipe = copy.deepcopy(reference)
    with pytest.raises(InputError, match="calibration has no inputs for the layer 'conv_in'"):
        quantize(pipe, QuantizationConfig(), calibration=Calibration({}))
    assert type(pipe.unet.conv_in) is torch.nn.Conv2d


def test_a_pipeline_without_a_denoiser_is_refused():
    class Empty:
        def __init__(self):
            self.components = {"vae": torch.nn.Identity()}

    with pytest.raises(InputError, match=r"no denoiser.*a unet or a transformer.*\['vae'\]"):
        quantize(Empty(), QuantizationConfig(), calibration=Calibration({}))
