import families
import pytest
import torch
from torch import nn

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
    assert [found[name][1] for name in SHORTCUTS] == SIZES
    for x, sizes in found.values():
        assert x.shape[1] == sum(sizes)
    assert not any(layer._forward_pre_hooks for layer in quantized_layers(denoiser).values())


def test_concatenated_features_of_a_transformer_are_found_too(tmp_path):
    pipe = families.pipeline("flux", tmp_path)
    paths = record_trajectories(pipe, calls=families.images)
    quantize(pipe, QuantizationConfig(refine=None, scheme="signed"), calibration=families.images)
    found = concatenated_inputs(pipe.transformer, paths, STEP[:1], ROW[:1])
    assert {name: sizes for name, (_, sizes) in found.items()} == {
        "single_transformer_blocks.0.proj_out": [32, 128]
    }
    assert split_inputs(pipe.transformer, trajectories=paths) == list(found)
    scale = pipe.transformer.single_transformer_blocks[0].proj_out.input_quantizer.scale
    assert scale.shape == (160,)
    assert families.images(pipe).isfinite().all()


def test_each_part_is_rounded_as_if_alone_where_one_format_suits_both():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 16, 16, generator=generator)
    x[:, 4:] *= 100
    quantizer = split_quantizer(nn.Conv2d(6, 1, 1), x, [4, 2], float_formats(4, signed=True))
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


def test_splitting_lowers_the_error_of_every_input_that_is_split(quantized, trajectories):
    denoiser = quantized()[0].unet
    with torch.no_grad():
        inputs = concatenated_inputs(denoiser, trajectories, STEP, ROW)
        before = {name: denoiser.get_submodule(name).input_quantizer for name in inputs}
        assert sorted(split_inputs(denoiser, trajectories=trajectories, samples=16)) == SHORTCUTS
        errors = torch.tensor(
            [
                [
                    (q(x) - x).square().sum()
                    for q in (before[name], denoiser.get_submodule(name).input_quantizer)
                ]
                for name, (x, _) in inputs.items()
            ]
        )
    assert errors.sum(0)[1] < errors.sum(0)[0]


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
