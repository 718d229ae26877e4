import copy

import numpy as np
import pytest
import torch

from msfp import Calibration, InputError, QuantizationConfig, quantize
from msfp.post_training import float_formats, integer_format, is_asymmetric, search_input, sqnr


def test_candidates_at_four_bits_are_those_of_the_paper():
    assert [str(f) for f in float_formats(4, signed=True)] == ["E1M2", "E2M1", "E3M0"]
    assert [str(f) for f in float_formats(4, signed=False)] == ["E1M3U", "E2M2U", "E3M1U", "E4M0U"]


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_candidates_have_the_width_asked_for_and_no_special_values(bits, signed):
    for fmt in float_formats(bits, signed=signed):
        assert fmt.bits == bits
        assert not fmt.has_nan
        assert not fmt.has_infinity


@pytest.mark.parametrize("bits", range(3, 9))
def test_integers_are_uniform_and_symmetric(bits):
    grid = integer_format(bits).values()
    assert len(grid) == 2**bits - 1
    assert len(np.unique(np.diff(grid))) == 1
    assert grid[0] == -grid[-1]


def test_unsigned_gains_three_decibels_after_silu(silu_inputs):
    best, signed = search_input(silu_inputs, 4, "mixup")
    signal = float(np.square(silu_inputs, dtype=np.float64).sum())
    assert not best.format.signed
    assert -0.3 <= best.zero_point <= -0.05
    assert sqnr(signal, best.squared_error) >= sqnr(signal, signed.squared_error) + 3


def test_symmetric_inputs_stay_signed():
    normal = np.random.default_rng(1).standard_normal(10_000)
    best, signed = search_input(normal, 4, "mixup")
    assert best.squared_error == signed.squared_error
    assert best.format.signed
    assert not is_asymmetric(normal)


def test_the_signed_scheme_never_chooses_unsigned(silu_inputs):
    best, _ = search_input(silu_inputs, 4, "signed")
    assert best.format.signed


def test_a_searched_clip_is_never_worse_than_none(silu_inputs):
    searched, _ = search_input(silu_inputs, 4, "int_mse")
    plain, _ = search_input(silu_inputs, 4, "int_minmax")
    assert searched.squared_error < plain.squared_error
    assert plain.scale == pytest.approx(silu_inputs.max() / float(integer_format(4).max))


def test_the_reported_error_is_that_of_the_swapped_quantizer(quantized, calibration):
    pipe, layers = quantized()
    for summary in layers[::8]:
        inputs = torch.from_numpy(calibration.inputs[summary.name])
        quantizer = pipe.unet.get_submodule(summary.name).input_quantizer
        noise = (quantizer(inputs) - inputs).double().square().sum().item()
        signal = inputs.double().square().sum().item()
        assert sqnr(signal, noise) == pytest.approx(summary.input_sqnr, abs=1e-4)


def test_first_and_last_layer_have_their_own_width(quantized):
    pipe, _ = quantized(weights=4, activations=3, first_last=6)
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
        quantize(pipe, QuantizationConfig(weights=3), calibration=calibration)


def test_the_plain_layer_keeps_its_weight_when_its_counterpart_is_sealed(quantized, reference):
    plain = copy.deepcopy(reference.unet.conv_in)
    layer = quantized()[0].unet.conv_in
    twin = type(layer).wrap(plain, layer.weight_quantizer, layer.input_quantizer)
    assert twin.weight is plain.weight
    twin.seal()
    assert torch.equal(plain.weight, reference.unet.conv_in.weight)


def test_integers_with_a_zero_point_lie_between_symmetric_ones_and_mixup(silu_inputs):
    errors = [
        search_input(silu_inputs, 4, scheme)[0].squared_error
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

    with pytest.raises(InputError, match=r"no denoiser.*unet or transformer.*\['vae'\]"):
        quantize(Empty(), QuantizationConfig(), calibration=Calibration({}))
