"""The README.md of a saved folder."""

import math

import pytest
import torch
from pipelines import CASES
from tiny import SAMPLER, tiny_pipeline
from torch import nn

import msfp
from msfp import InputError, QuantizationConfig, load, pack, quantize, save
from msfp.checkpoint.model_card import Measured


def card(folder):
    return (folder / "README.md").read_text()


def program(text):
    """The lines of Python of a card."""
    return text.partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed pipeline and its folder."""
    folder = tmp_path_factory.mktemp("card") / "digits-w4a4"
    pipe = tiny_pipeline()
    quantize(pipe, calibration=SAMPLER.calls(4, seed=1))
    pack(pipe)
    save(pipe, folder)
    return pipe, folder


def test_the_lines_of_a_card_load_the_folder(packed, monkeypatch):
    pipe, folder = packed
    monkeypatch.chdir(folder.parent)
    names = {}
    exec(program(card(folder)), names)  # noqa: S102
    loaded = names["model"]
    assert torch.equal(SAMPLER(loaded, 4, 0), SAMPLER(pipe, 4, 0))


def test_a_card_says_what_was_quantized_and_how_and_the_error(packed):
    pipe, folder = packed
    text = card(folder)
    layers = len(msfp.inspect_layers(folder))
    measured = pipe.unet.hf_quantizer.quantization_config.measured
    for line in (
        "# UNet2DModel, quantized by msfp",
        f"- {layers} layers, ",
        "- 4 bits: ",
        "- Scheme `mixup`; weights are refined (gptq, branches of rank 16).",
        f"on 8 samples of the calibration calls: {measured.sqnr:.1f} dB.",
        f"- msfp {msfp.__version__}",
    ):
        assert line in text
    assert "base_model" not in text
    assert measured.samples == 8
    assert 10 < measured.sqnr < 40


def test_the_measured_error_is_that_of_the_predictions(packed):
    pipe, _ = packed
    path = msfp.record_trajectories(tiny_pipeline(), calls=SAMPLER.calls(4, seed=1))
    pipe.unet.requires_grad_(False)
    chosen = torch.linspace(0, 15, 8).round().long()
    noise = path.predict(pipe, chosen // 4, chosen % 4) - path.predictions[chosen // 4, chosen % 4]
    energy = path.predictions[chosen // 4, chosen % 4].double().square().sum()
    ratio = 10 * math.log10(energy / noise.double().square().sum())
    measured = pipe.unet.hf_quantizer.quantization_config.measured
    assert measured.sqnr == pytest.approx(ratio, abs=1e-4)
    assert load(packed[1]).unet.hf_quantizer.quantization_config.measured == measured


def test_an_error_that_training_changed_is_not_told(packed, tmp_path):
    plain, pipe = tiny_pipeline(), load(packed[1])
    path = msfp.record_trajectories(plain, calls=SAMPLER.calls(4, seed=1))
    msfp.unpack(pipe, original=plain)
    config = msfp.FinetuneConfig(rank=2, steps=1, batch=2)
    msfp.finetune(pipe, config, trajectories=path, original=plain)
    save(pipe, tmp_path / "tuned")
    assert "The error of the predictions was not measured." in card(tmp_path / "tuned")


def test_every_network_of_a_pipeline_has_a_section_and_the_hub_is_named(tmp_path):
    case = CASES["WanPipeline, two experts"]
    pipe = case.make()
    pipe.register_to_config(_name_or_path="owner/wan")
    quantize(pipe, QuantizationConfig(refine=None), calibration=case.call)
    pack(pipe)
    save(pipe, tmp_path / "packed")
    text = card(tmp_path / "packed")
    assert "# WanTransformer3DModel, quantized by msfp" in text
    assert text.index("\n## transformer\n") < text.index("\n## transformer_2\n")
    assert "base_model: owner/wan\n" in text
    assert "each weight is rounded to nearest" in text


def test_a_network_without_a_pipeline_is_loaded_into_another(tmp_path):
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize(network, QuantizationConfig(activation_bits=None, end_bits=4))
    pack(network)
    save(network, tmp_path / "packed")
    assert 'msfp.load("packed", into=Sequential(...))' in card(tmp_path / "packed")
    assert "Formats of inputs (number of layers): none (2)." in card(tmp_path / "packed")


@pytest.mark.parametrize("values", [3, {}, {"sqnr": "a", "samples": 1}])
def test_an_error_of_another_form_is_refused(values):
    with pytest.raises(InputError, match="measured must have sqnr and samples"):
        Measured.from_dict(values)
    assert Measured.from_dict(Measured(math.inf, 3).to_dict()) == Measured(math.inf, 3)
