import families
import pytest
import torch
from torch import nn

from fpformats import Histogram
from msfp import FinetuneConfig, QuantizationConfig, finetune, quantize, record_trajectories
from msfp.layers.base import quantized_layers
from msfp.ptq.concatenations import concatenated_inputs, split_inputs, split_quantizer
from msfp.search.schemes import float_formats

STEP, ROW = torch.arange(4), torch.zeros(4, dtype=torch.int64)
SHORTCUTS = [f"up_blocks.{i}.resnets.{j}.conv_shortcut" for i in range(3) for j in range(2)]
SIZES = [[96, 96], [96, 64], [96, 64], [64, 32], [64, 32], [32, 32]]


def test_the_layers_found_are_the_shortcuts_of_the_up_path(quantized, trajectories):
    denoiser = quantized()[0].unet
    found = concatenated_inputs(denoiser, trajectories, STEP[:1], ROW[:1])
    assert sorted(found) == SHORTCUTS
    assert [list(found[name]) for name in SHORTCUTS] == [[0, first] for first, _ in SIZES]
    for name, (one, other) in zip(SHORTCUTS, SIZES, strict=True):
        counts = [histogram.count for histogram in found[name].values()]
        assert counts[0] * other == counts[1] * one
    assert not any(layer._forward_pre_hooks for layer in quantized_layers(denoiser).values())


def test_concatenated_features_of_a_transformer_are_found_too(tmp_path):
    pipe = families.pipeline("flux", tmp_path)
    paths = record_trajectories(pipe, calls=families.images)
    quantize(pipe, QuantizationConfig(refine=None, scheme="signed"), calibration=families.images)
    found = concatenated_inputs(pipe.transformer, paths, STEP[:1], ROW[:1])
    assert {name: list(parts) for name, parts in found.items()} == {
        "single_transformer_blocks.0.proj_out": [0, 32]
    }
    assert split_inputs(pipe.transformer, trajectories=paths) == list(found)
    scale = pipe.transformer.single_transformer_blocks[0].proj_out.input_quantizer.scale
    assert scale.shape == (160,)
    assert families.images(pipe).isfinite().all()


def test_each_part_is_rounded_as_if_alone_where_one_format_suits_both():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 16, 16, generator=generator)
    x[:, 4:] *= 100
    parts = {start: Histogram() for start in (0, 4)}
    for histogram, part in zip(parts.values(), x.split([4, 2], 1), strict=True):
        histogram.update(part)
    quantizer = split_quantizer(nn.Conv2d(6, 1, 1), parts, float_formats(4, signed=True))
    assert quantizer.scale.shape == (6, 1, 1)
    scales = quantizer.scale.flatten()
    assert (scales[:4] == scales[0]).all()
    assert (scales[4:] == scales[5]).all()
    errors = [
        ((quantizer(x) - x)[:, part].square().mean() / x[:, part].square().mean()).item()
        for part in (slice(0, 4), slice(4, 6))
    ]
    assert max(errors) < 0.02
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@torch.no_grad()
def test_splitting_lowers_the_error_of_every_input_that_is_split(quantized, trajectories):
    denoiser, inputs = quantized()[0].unet, {}
    for name in SHORTCUTS:
        denoiser.get_submodule(name).register_forward_pre_hook(
            lambda _layer, args, name=name: inputs.update({name: inputs.get(name, args[0])})
        )
    trajectories.predict(denoiser, STEP, ROW)
    before = {name: denoiser.get_submodule(name).input_quantizer for name in inputs}
    assert sorted(split_inputs(denoiser, trajectories=trajectories, samples=16)) == SHORTCUTS
    after = {name: denoiser.get_submodule(name).input_quantizer for name in inputs}
    old, new = (
        sum((quantizers[name](x) - x).square().sum() for name, x in inputs.items())
        for quantizers in (before, after)
    )
    assert new < old


def test_parts_are_the_same_in_several_forwards(quantized, trajectories, monkeypatch):
    found = []
    for together in (2**16, 1):
        monkeypatch.setattr("msfp.ptq.side_by_side.TOGETHER", together)
        found.append(concatenated_inputs(quantized()[0].unet, trajectories, STEP, ROW))
    for one, other in zip(*(each.values() for each in found), strict=True):
        assert list(one) == list(other)
        for histograms in zip(one.values(), other.values(), strict=True):
            assert histograms[0].count == histograms[1].count
            sums = [histogram.bins()[2].sum() for histogram in histograms]
            assert sums[0] == pytest.approx(sums[1], rel=0.01)


def test_a_split_denoiser_can_be_fine_tuned(quantized, trajectories):
    denoiser = quantized()[0].unet
    names = split_inputs(denoiser, trajectories=trajectories, samples=8)
    history = finetune(
        denoiser, FinetuneConfig(rank=2, steps=2, batch=4), trajectories=trajectories
    )
    assert len(history.losses) == 2
    for name in names:
        layer = denoiser.get_submodule(name)
        assert layer.formats.input_granularity == "channel"
        assert (layer.input_scale.view(torch.float32) > 0).all()
