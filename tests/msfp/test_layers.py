import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fpformats import quantize_scaled
from msfp.layers import QuantConv2d, QuantLinear, quantized_layers, seal


def test_every_conv_and_linear_is_swapped_and_stays_one(quantized, reference):
    plain = [m for m in reference.unet.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    layers = quantized_layers(quantized()[0].unet)
    assert len(layers) == len(plain) == 65
    assert all(isinstance(layer, (QuantConv2d, QuantLinear)) for layer in layers.values())
    assert all(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in layers.values())


def test_a_convolution_computes_on_rounded_weights_and_inputs_with_true_zero_padding(quantized):
    layer = quantized()[0].unet.down_blocks[0].resnets[0].conv1
    x = torch.randn(2, 32, 16, 16).sigmoid() - 0.2
    inputs, weights = layer.input_quantizer, layer.weight_quantizer
    assert not inputs.format.signed
    rounded = quantize_scaled(x, inputs.format, inputs.scale, inputs.zero_point)
    weight = quantize_scaled(layer.weight, weights.format, weights.scale)
    assert torch.equal(layer(x), F.conv2d(F.pad(rounded, (1,) * 4), weight, layer.bias))


def test_sealed_weights_are_values_of_the_format_times_the_scale(quantized):
    pipe, _ = quantized()
    seal(pipe.unet)
    for layer in quantized_layers(pipe.unet).values():
        quantizer = layer.weight_quantizer
        again = quantize_scaled(layer.entries, quantizer.format, quantizer.scale)
        assert torch.equal(again, layer.entries)
        assert torch.equal(layer.weight, layer.entries[0])


def test_sealing_keeps_the_prediction_bit_for_bit(quantized):
    pipe, _ = quantized()
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        before = pipe.unet(x, 500).sample
        seal(pipe.unet)
        assert torch.equal(pipe.unet(x, 500).sample, before)


def test_gradients_pass_straight_through_both_quantizers(quantized):
    layer = quantized()[0].unet.mid_block.resnets[0].conv1
    layer.weight.requires_grad_(True)
    low = layer.input_quantizer.zero_point.item()
    x = torch.full((1, 96, 4, 4), low / 2, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["conv_in", "down_blocks.1.attentions.0.to_q"])
def test_repr_names_the_formats(quantized, name):
    pipe, layers = quantized()
    chosen = next(layer for layer in layers if layer.name == name)
    assert chosen.weight_format in repr(pipe.unet.get_submodule(name))
