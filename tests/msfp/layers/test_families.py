import pytest
import torch
from torch import nn

from fpformats import E2M1, Histogram, parse
from msfp import InputError, QuantizationConfig, quantize
from msfp.layers.block import BlockLayer
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.families import FAMILIES, family_of
from msfp.layers.formats import LayerFormats
from msfp.layers.kinds import KINDS, kind_of, plain_class
from msfp.layers.scaled import ScaledLayer
from msfp.layers.selection import quantizable_layers
from msfp.layers.trainable import TrainableLayer
from msfp.layers.trainable_block import TrainableBlockLayer
from msfp.ptq.concatenations import split_quantizer
from msfp.ptq.moments import layer_moments
from msfp.search.layer_search import pack_layer, quantize_layer


def test_every_kind_has_a_family_and_no_other_class_has():
    assert list(FAMILIES) == list(KINDS)


@pytest.mark.parametrize("plain", FAMILIES)
def test_the_classes_of_a_family_compute_as_the_plain_one(plain):
    family = FAMILIES[plain]
    bases = ScaledLayer, TrainableLayer, BlockLayer, TrainableBlockLayer
    for layer, base in zip(family, bases, strict=True):
        assert issubclass(layer, base)
        assert issubclass(layer, plain)
        assert plain_class(layer) is plain
        assert layer.kind is KINDS[plain]
    assert family.trainable.packed_class is family.packed
    assert family.trainable_block.block_class is family.block


@pytest.mark.parametrize("plain", FAMILIES)
def test_the_family_of_a_layer_is_that_of_its_plain_class(plain):
    layer = plain(2, 3) if plain is nn.Linear else plain(2, 3, 1)
    quantizer = Quantizer(E2M1, torch.ones(3, *(1,) * (layer.weight.dim() - 1)))
    trainable = family_of(layer).trainable.wrap(layer, quantizer, None)
    for each in (layer, trainable, trainable.pack()):
        assert family_of(each) is FAMILIES[plain]


TRANSPOSED = nn.ConvTranspose2d(2, 3, 1)
SETTINGS = QuantizationConfig(activation_bits=None).settings("inner")
IN_BLOCKS = QuantizationConfig(scheme="mx", activation_bits=None).settings("inner")
LOOK_UPS = {
    "plain_class": lambda: plain_class(type(TRANSPOSED)),
    "kind_of": lambda: kind_of(TRANSPOSED),
    "family_of": lambda: family_of(TRANSPOSED),
    "quantize_layer": lambda: quantize_layer("a", TRANSPOSED, SETTINGS, None),
    "quantize_layer in blocks": lambda: quantize_layer("a", TRANSPOSED, IN_BLOCKS, None),
    "pack_layer": lambda: pack_layer("a", TRANSPOSED, TRANSPOSED.weight, SETTINGS),
    "split_quantizer": lambda: split_quantizer(TRANSPOSED, {0: Histogram()}, [E2M1]),
    "layer_moments": lambda: layer_moments(
        TRANSPOSED, [(torch.ones(1, 2, 1, 1), torch.ones(1, 3, 1, 1))], 1
    ),
}


@pytest.mark.parametrize("look_up", LOOK_UPS)
def test_a_transposed_convolution_is_taken_for_no_other_layer(look_up):
    with pytest.raises(InputError, match="ConvTranspose2d cannot be quantized: it is none"):
        LOOK_UPS[look_up]()


def test_a_class_that_is_mixed_with_a_layer_of_no_kind_has_none():
    class QuantTransposed(ScaledLayer, nn.ConvTranspose2d):
        """What nobody has made."""

    assert not hasattr(QuantTransposed, "kind")
    with pytest.raises(InputError, match="QuantTransposed cannot be quantized"):
        kind_of(QuantTransposed.empty_like(TRANSPOSED, LayerFormats(parse("E2M1"))))


def test_a_transposed_convolution_stays_as_it_is():
    network = nn.Sequential(nn.ConvTranspose2d(2, 3, 1), nn.Flatten(1), nn.Linear(3, 3))
    assert list(quantizable_layers(network)) == ["2"]
    quantize(network, QuantizationConfig(activation_bits=None, end_bits=4))
    assert type(network[0]) is nn.ConvTranspose2d
    with pytest.raises(InputError, match="include has '0', which matches no layer"):
        quantize(nn.Sequential(nn.ConvTranspose2d(2, 3, 1), nn.Linear(3, 3)),
                 QuantizationConfig(include=["0"], activation_bits=None, end_bits=4))  # fmt: skip
