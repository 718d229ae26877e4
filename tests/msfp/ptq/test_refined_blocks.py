"""Refining layers in block formats."""

import families
import pytest
import torch
from torch import nn

import msfp
from msfp import (
    FinetuneConfig,
    InputError,
    QuantizationConfig,
    RefinementConfig,
    finetune,
    pack,
    quantize,
)
from msfp.evaluation.prediction_errors import noise_errors
from msfp.layers.base import quantized_layers
from msfp.layers.block import BlockLayer
from msfp.layers.formats import BlockFormats
from msfp.layers.trainable import trainable_layers
from msfp.layers.trainable_block import TrainableBlockLayer
from msfp.pipelines.denoiser import denoiser_of

SCHEMES = ["mx", "nvfp4", "nvfp4_int4"]
FEW = {"samples": 16, "branch_rank": 0, "rotate_inputs": False}


@pytest.fixture(scope="module")
def paths():
    return msfp.record_trajectories(families.pipeline("unet", None), calls=families.images)


def quantized(family="unet", scheme="nvfp4", folder=None, **config):
    pipe = families.pipeline(family, folder)
    quantize(pipe, QuantizationConfig(scheme=scheme, **config), calibration=families.images)
    return pipe


def error(pipe, paths):
    return sum(noise_errors(pipe, trajectories=paths))


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param("mx", marks=pytest.mark.slow),
        "nvfp4",
        pytest.param("nvfp4_int4", marks=pytest.mark.slow),
    ],
)
def test_refinement_lowers_the_error_and_branches_lower_it_more(paths, scheme):
    plain = quantized(scheme=scheme, refine=None)
    assert all(isinstance(each, BlockLayer) for each in quantized_layers(plain.unet).values())
    refined = quantized(scheme=scheme, refine=RefinementConfig(**FEW))
    branched = quantized(scheme=scheme, refine=RefinementConfig(samples=16, branch_rank=2))
    errors = [error(each, paths) for each in (plain, refined, branched)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < errors[1]


def test_calls_refine_by_default_and_without_them_layers_are_packed_at_once():
    refined = quantized("dit", refine=RefinementConfig(samples=8))
    default = families.pipeline("dit", None)
    quantize(default, QuantizationConfig(scheme="nvfp4"), calibration=families.images)
    for pipe in (refined, default):
        layers = quantized_layers(denoiser_of(pipe)).values()
        assert all(isinstance(each, TrainableBlockLayer) for each in layers)
    assert (
        denoiser_of(default).hf_quantizer.quantization_config.request.refine == RefinementConfig()
    )
    bare = families.pipeline("dit", None)
    quantize(bare, QuantizationConfig(scheme="nvfp4"))
    layers = quantized_layers(denoiser_of(bare)).values()
    assert all(isinstance(each, BlockLayer) for each in layers)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
def test_weights_are_values_of_their_blocks_and_are_packed_as_they_are(paths, scheme, dtype):
    pipe = families.pipeline("unet", None).to(dtype)
    paths = paths if dtype is torch.float32 else None
    config = QuantizationConfig(scheme=scheme, refine=RefinementConfig(samples=8, branch_rank=2))
    quantize(pipe, config, calibration=families.images, trajectories=paths)
    layers = trainable_layers(pipe.unet)
    for name, layer in layers.items():
        if "time" not in name:  # their input is the same for all samples
            assert torch.equal(layer.quantized_weight(), layer.weight)
    expected = families.call(pipe.unet)
    pack(pipe)
    for name, layer in quantized_layers(pipe.unet).items():
        assert torch.equal(layer.quantized_weight(), layers[name].quantized_weight())
    assert torch.equal(families.call(pipe.unet), expected)


def test_a_folder_gives_the_same_bits_and_says_what_it_is(tmp_path):
    pipe = quantized(refine=RefinementConfig(samples=8, branch_rank=2))
    pack(pipe)
    expected = families.call(pipe.unet)
    msfp.save(pipe, tmp_path / "saved")
    loaded = msfp.load(tmp_path / "saved")
    assert torch.equal(families.call(loaded.unet), expected)
    formats = {each.formats for each in msfp.inspect_layers(tmp_path / "saved")}
    assert BlockFormats("NVFP4", "NVFP4", 2) in formats
    assert "branch" in (tmp_path / "saved" / "README.md").read_text()


@pytest.mark.slow
def test_searched_scales_of_inputs_lower_the_error_and_are_saved(paths, tmp_path):
    plain = quantized(refine=RefinementConfig(**FEW))
    pipe = quantized(refine=RefinementConfig(**FEW, search_input_scales=True))
    assert error(pipe, paths) < error(plain, paths)
    formats = {each.formats for each in quantized_layers(pipe.unet).values()}
    assert formats == {
        BlockFormats("NVFP4", "NVFP4", 0, searches_inputs=True),
        BlockFormats("MXINT8", "MXINT8"),
    }
    pack(pipe)
    expected = families.call(pipe.unet)
    msfp.save(pipe, tmp_path / "saved")
    loaded = msfp.load(tmp_path / "saved")
    assert {each.formats for each in quantized_layers(loaded.unet).values()} == formats
    assert torch.equal(families.call(loaded.unet), expected)


@pytest.mark.slow
def test_branches_are_exported_as_a_lora(tmp_path):
    config = RefinementConfig(samples=8, branch_rank=2)
    pipe = quantized("conditional_unet", folder=tmp_path, refine=config)
    pack(pipe)
    expected = families.call(pipe.unet)
    file = msfp.export_lora(pipe, tmp_path / "exported")
    assert file.exists()
    bare = msfp.load(tmp_path / "exported")
    assert all(not each.formats.branch_rank for each in quantized_layers(bare.unet).values())
    bare.load_lora_weights(file.parent, weight_name=file.name)
    assert torch.allclose(families.call(bare.unet), expected, atol=1e-4)


def interrupt_at(stage, done):
    def tell(now, so_far, _total, _note="", /):
        if (now, so_far) == (stage, done):
            raise KeyboardInterrupt

    return tell


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_with_the_same_bits(tmp_path):
    config = QuantizationConfig(scheme="nvfp4", refine=RefinementConfig(samples=8, branch_rank=2))

    def run(folder, **options):
        pipe = families.pipeline("unet", None)
        quantize(pipe, config, calibration=families.images, state=folder, **options)
        pack(pipe)
        return pipe.unet.state_dict()

    expected = run(None)
    for stage, done in (("adding branches", 5), ("refining", 7), ("refining", 30)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, progress=interrupt_at(stage, done))
    found = run(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.slow
def test_columns_in_parts_are_refined_too(paths, monkeypatch):
    plain = quantized(refine=None)
    monkeypatch.setattr("msfp.ptq.refinement.MOST_COLUMNS", 12)
    parts = quantized(refine=RefinementConfig(**FEW))
    for name, layer in trainable_layers(parts.unet).items():
        if "time" not in name:
            assert torch.equal(layer.quantized_weight(), layer.weight)
    assert error(parts, paths) < 0.7 * error(plain, paths)


def test_layers_in_blocks_are_refined_beside_others(paths):
    overrides = {"mid_block": {"scheme": "nvfp4"}}
    config = {"scheme": "mixup", "overrides": overrides}
    plain = quantized(**config, refine=None)
    refined = quantized(**config, refine=RefinementConfig(**FEW))
    kinds = {type(each.formats) for each in quantized_layers(refined.unet).values()}
    assert len(kinds) == 2
    assert error(refined, paths) < 0.7 * error(plain, paths)


def test_fine_tuning_is_refused_by_name(paths):
    pipe = quantized(refine=RefinementConfig(**FEW))
    with pytest.raises(InputError, match=r"layer '.*' cannot be fine-tuned: weight="):
        finetune(pipe, FinetuneConfig(steps=1), trajectories=paths)


@pytest.mark.parametrize("name", ["attention_bits", "budget"])
def test_what_blocks_do_not_have_is_refused_by_name(name):
    value = {"attention_bits": 4, "budget": 4.5}[name]
    with pytest.raises(InputError, match=f"{name} must be None"):
        quantized(**{name: value})


@pytest.mark.parametrize("config", [{"scheme": "mixup"}, {"activation_bits": None}])
def test_a_search_that_no_layer_can_do_is_refused(config):
    with pytest.raises(InputError, match="search_input_scales must be False where no layer has"):
        quantized(**config, refine=RefinementConfig(**FEW, search_input_scales=True))


def test_a_network_that_is_no_pipeline_is_refined():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    wanted = network(x).detach()
    config = QuantizationConfig(scheme="nvfp4", end_bits=4, refine=RefinementConfig(branch_rank=0))
    quantize(network, config, calibration=lambda model: model(x))
    near = (network(x) - wanted).square().mean()
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
    quantize(other, QuantizationConfig(scheme="nvfp4", end_bits=4, refine=None))
    assert near < (other(x) - wanted).square().mean()
