"""Which layers get a scale for each token, and that they are better for it."""

import families
import pytest
import torch
from torch import nn

import msfp
from msfp import InputError, QuantizationConfig, RefinementConfig, pack, quantize
from msfp.layers.base import quantized_layers
from msfp.layers.trainable import trainable_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.ptq.token_scales import scale_tokens

CONFIG = QuantizationConfig(refine=None)


@pytest.fixture(scope="module")
def paths():
    return msfp.record_trajectories(families.pipeline("dit", None), calls=families.images)


def quantized(family="dit", config=CONFIG):
    pipe = families.pipeline(family, None)
    quantize(pipe, config, calibration=families.images)
    return pipe


def granularities(network):
    return {n: each.formats.input_granularity for n, each in quantized_layers(network).items()}


def test_layers_have_scales_for_tokens_where_the_error_is_less(paths):
    pipe = quantized()
    before = {n: each.input_quantizer for n, each in trainable_layers(denoiser_of(pipe)).items()}
    inputs = {}
    for name in before:
        denoiser_of(pipe).get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: inputs.update(
                {name: inputs.get(name, args[0] if args else kwargs.get("input"))}
            ),
            with_kwargs=True,
        )
    chosen = scale_tokens(pipe, trajectories=paths)
    assert 0 < len(chosen) < len(before)
    found = granularities(denoiser_of(pipe))
    assert [name for name, each in found.items() if each == "token"] == chosen
    after = {n: each.input_quantizer for n, each in trainable_layers(denoiser_of(pipe)).items()}
    families.images(pipe)
    errors = [
        sum(float((each[name](inputs[name]) - inputs[name]).square().sum()) for name in chosen)
        for each in (before, after)
    ]
    assert errors[1] < errors[0]


def test_the_signs_and_widths_of_formats_stay(paths):
    one, other = quantized(), quantized()
    scale_tokens(other, trajectories=paths)
    for before, after in zip(
        *(trainable_layers(denoiser_of(pipe)).values() for pipe in (one, other)), strict=True
    ):
        assert before.formats.input.bits == after.formats.input.bits
        assert before.formats.input.signed == after.formats.input.signed
        if before.formats.input.bits == 8:
            assert after.formats.input_granularity == "tensor"


def test_convolutions_and_parts_of_inputs_keep_their_scales():
    pipe = families.pipeline("unet", None)
    config = QuantizationConfig(refine=RefinementConfig(samples=8, token_scales=True))
    quantize(pipe, config, calibration=families.images)
    for layer in trainable_layers(denoiser_of(pipe)).values():
        if not isinstance(layer, nn.Linear):
            assert layer.formats.input_granularity != "token"


def test_choices_are_the_same_in_forwards_of_any_size(paths):
    found = []
    for batch in (1, 8):
        pipe = quantized()
        scale_tokens(pipe, trajectories=paths, batch=batch)
        found.append(sum(each == "token" for each in granularities(denoiser_of(pipe)).values()))
    assert found[0] == pytest.approx(found[1], abs=2)


def test_a_checkpoint_keeps_the_scales_and_the_bits(tmp_path):
    config = QuantizationConfig(refine=RefinementConfig(samples=8, token_scales=True))
    pipe = quantized(config=config)
    names = [n for n, each in granularities(denoiser_of(pipe)).items() if each == "token"]
    assert names
    pack(pipe)
    wanted = families.images(pipe)
    msfp.save(pipe, tmp_path / "packed")
    loaded = msfp.load(tmp_path / "packed")
    assert torch.equal(families.images(loaded), wanted)
    facts = {each.layer: each for each in msfp.inspect_layers(tmp_path / "packed")}
    assert all(facts[name].float_reason is None for name in names)


def test_a_state_resumes_to_the_same_scales(tmp_path):
    found, config = [], QuantizationConfig(refine=RefinementConfig(samples=8, token_scales=True))
    for _ in range(2):
        pipe = families.pipeline("dit", None)
        quantize(pipe, config, calibration=families.images, state=tmp_path / "state")
        found.append(denoiser_of(pipe).state_dict())
    assert all(torch.equal(each, found[1][name]) for name, each in found[0].items())


def test_wrong_arguments_are_refused(paths):
    with pytest.raises(InputError, match="token_scales must be"):
        RefinementConfig(token_scales=1)
    with pytest.raises(InputError, match="samples must be between 1 and"):
        scale_tokens(quantized(), trajectories=paths, samples=0)
    pipe = quantized()
    pack(pipe)
    with pytest.raises(InputError, match="not yet packed"):
        scale_tokens(pipe, trajectories=paths)
