"""Pipelines with more than one denoiser."""

import pytest
import torch
from pipelines import CASES

import msfp
from msfp.layers.base import quantized_layers
from msfp.layers.packed import packed_layers
from msfp.layers.selection import quantizable_layers
from msfp.ptq.stored_size import layer_bytes

CASE = CASES["WanPipeline, two experts"]
CONFIG = msfp.QuantizationConfig(refine=None)


@pytest.fixture
def pipe():
    return CASE.make()


def formats(pipe, name):
    return {key: str(layer.formats) for key, layer in quantized_layers(getattr(pipe, name)).items()}


def test_each_denoiser_is_calibrated_by_what_it_saw(pipe):
    alone = CASE.make()
    for name in CASE.denoisers:
        msfp.quantize(msfp.select_denoisers(pipe, name), CONFIG, calibration=CASE.call)
    layers = msfp.quantize(alone, CONFIG, calibration=CASE.call)
    assert formats(alone, "transformer") == formats(pipe, "transformer")
    summaries = {
        name: getattr(alone, name).hf_quantizer.quantization_config.summaries
        for name in CASE.denoisers
    }
    assert summaries["transformer"] != summaries["transformer_2"]
    assert [layer.name for layer in layers] == [
        f"{name}.{each.name}" for name in CASE.denoisers for each in summaries[name]
    ]


def test_the_second_denoiser_sees_the_first_in_full_precision(pipe):
    seen = msfp.calibrate(msfp.select_denoisers(pipe, "transformer_2"), calls=CASE.call)
    one, both = CASE.make(), pipe
    msfp.quantize(msfp.select_denoisers(one, "transformer_2"), CONFIG, calibration=seen)
    msfp.quantize(both, CONFIG, calibration=CASE.call)
    found = [each.transformer_2.state_dict() for each in (one, both)]
    assert all(torch.equal(found[0][key], value) for key, value in found[1].items())


@pytest.mark.slow
def test_each_denoiser_has_the_budget_to_itself(pipe):
    plain = {name: quantizable_layers(getattr(pipe, name)) for name in CASE.denoisers}
    config = msfp.QuantizationConfig(budget=6, end_bits=4, refine=msfp.RefinementConfig(samples=4))
    msfp.quantize(pipe, config, calibration=CASE.call)
    for name, layers in plain.items():
        found = quantized_layers(getattr(pipe, name))
        sizes = {
            layer: layer_bytes(layers[layer], each.formats.weight.bits, each.formats.branch_rank)
            for layer, each in found.items()
        }
        weights = sum(layers[layer].weight.numel() for layer in found)
        assert 5 < 8 * sum(sizes.values()) / weights <= 6
        assert len({each.formats.weight.bits for each in found.values()}) > 1


def test_functions_of_one_network_ask_which(pipe):
    message = (
        r"model has 2 denoisers, transformer and transformer_2: select one, as in "
        r"msfp.select_denoisers\(model, 'transformer'\)"
    )
    with pytest.raises(msfp.InputError, match=message):
        msfp.calibrate(pipe, calls=CASE.call)
    calibration = msfp.calibrate(msfp.select_denoisers(pipe, "transformer"), calls=CASE.call)
    with pytest.raises(msfp.InputError, match=message):
        msfp.quantize(pipe, CONFIG, calibration=calibration)


def test_a_selection_shares_its_components(pipe):
    selected = msfp.select_denoisers(pipe, "transformer_2")
    msfp.quantize(selected, CONFIG, calibration=CASE.call)
    assert quantized_layers(pipe.transformer_2)
    assert not quantized_layers(pipe.transformer)
    assert msfp.pack(pipe) == list(packed_layers(pipe.transformer_2))
    with pytest.raises(msfp.InputError, match=r"names must be one of .*, not 'unet'"):
        msfp.select_denoisers(pipe, "unet")
    with pytest.raises(msfp.InputError, match="names must hold at least one of"):
        msfp.select_denoisers(pipe, [])


@pytest.mark.slow
def test_a_network_that_is_no_denoiser_can_be_selected(tmp_path):
    case = CASES["StableDiffusionControlNetPipeline"]
    pipe = case.make()
    msfp.quantize(
        msfp.select_denoisers(pipe, ["unet", "controlnet"]), CONFIG, calibration=case.call
    )
    msfp.pack(pipe)
    msfp.save(pipe, tmp_path / "packed")
    loaded = msfp.load(tmp_path / "packed")
    assert packed_layers(loaded.controlnet).keys() == packed_layers(pipe.controlnet).keys()
    assert torch.equal(case.call(loaded), case.call(pipe))
    names = {each.layer.partition(".")[0] for each in msfp.inspect_layers(tmp_path / "packed")}
    assert names == {"unet", "controlnet"}
    assert len(msfp.inspect_coverage(pipe).shares()) == 3


def test_nothing_changes_if_one_of_them_cannot_be_quantized(pipe):
    runs = []

    def spoil(pipe):
        CASE.call(pipe)
        runs.append(1)
        if len(runs) == len(CASE.denoisers):
            pipe.transformer_2.proj_out.weight.data[0, 0] = torch.nan

    with pytest.raises(msfp.InputError, match="the weight of layer 'proj_out' is not finite"):
        msfp.quantize(pipe, CONFIG, calibration=spoil)
    for name in CASE.denoisers:
        network = getattr(pipe, name)
        assert not quantized_layers(network)
        assert "quantization_config" not in network.config
        assert not hasattr(network, "hf_quantizer")


def test_calls_that_leave_a_denoiser_out_are_refused(pipe):
    def short(pipe):
        CASE.call(pipe, num_inference_steps=1)

    with pytest.raises(msfp.InputError, match=r"call 0 did not run the transformer_?2?: give"):
        msfp.quantize(pipe, CONFIG, calibration=short)
    assert not any(quantized_layers(getattr(pipe, name)) for name in CASE.denoisers)
