"""The settings of docs/external-models.md, from a pipeline folder to the table, on stand-ins."""

import json
import math

import numpy as np
import pytest
import torch
from external import stand_in
from families import ENDS
from PIL import Image
from refusals import assert_refused

from msfp import inspect_layers, load
from msfp.cli.main import main
from msfp.evaluation.dataset_statistics import DatasetStatistics
from msfp.evaluation.frechet import FeatureMoments, frechet_distance
from msfp.layers.lora.talora import routing_of
from msfp.pipelines.denoiser import denoiser_of
from msfp.support.image_files import PngFolder

SIZES = {"ddpm": 8, "ldm-vq": 16, "ldm-kl": 16, "ldm-class": 16, "dit": 16, "stable-diffusion": 16}
SAMPLING = ("--count", 5, "--seed", 7)


def msfp(*arguments):
    return main([str(word) for word in arguments])


def calls(setting, folder):
    """What the documented commands say of the pipeline's call, of both kinds of commands."""
    words = {
        "ddpm": ("--sampler", "ddim"),
        "ldm-vq": ("--sampler", "dpm++"),
        "ldm-kl": (),
        "ldm-class": ("--labels", 0, 3, "--guidance-scale", 3),
        "dit": ("--labels", 0, 3, "--guidance-scale", 4, "--sampler", "ddim"),
        "stable-diffusion": (
            "--prompts", folder / "prompts.txt", "--guidance-scale", 7.5, "--sampler", "plms",
        ),
    }[setting]  # fmt: skip
    sampling = (*words, "--steps", 2, "--batch", 3)
    training = (*words, "--sampler-steps", 2, "--sampler-batch", 3)
    return sampling, training


SETTINGS = [
    "ddpm", "stable-diffusion",
    pytest.param("ldm-vq", marks=pytest.mark.slow),
    pytest.param("ldm-kl", marks=pytest.mark.slow),
    pytest.param("ldm-class", marks=pytest.mark.slow),
    pytest.param("dit", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.fixture(scope="module", params=SETTINGS)
def walked(request, tmp_path_factory):
    """A setting and the folder in which all commands but the last were run."""
    setting = request.param
    folder = tmp_path_factory.mktemp(setting)
    stand_in(setting, folder / "vocabulary").save_pretrained(folder / "plain")
    (folder / "prompts.txt").write_text("a\na a\n")
    (folder / "data").mkdir()
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{number}.png")
    sampling, training = calls(setting, folder)
    exclude = ("--exclude", "encoder_hid_proj") if setting == "ldm-class" else ()
    for words in (
        ("quantize", folder / "plain", "--refine", "none", *exclude, *sampling, "--count", 3,
         "--output", folder / "w4a4"),
        ("finetune", folder / "w4a4", "--original", folder / "plain", *training, "--count", 3,
         "--held-out", 2, "--hub", 2, "--rank", 2, "--dfa-power", 1, "--steps", 2, "--batch", 2,
         "--evaluate-every", 2, "--save-every", 2,
         "--output", folder / "tuned"),
        ("statistics", folder / "data", "--features", "pixels", "--size", SIZES[setting],
         "--output", folder / "statistics.safetensors"),
    ):  # fmt: skip
        assert msfp(*words) == 0
    return setting, folder


def test_a_setting_ends_in_a_table_of_distances_from_the_data_set(walked, capsys):
    setting, folder = walked
    sampling, _ = calls(setting, folder)
    words = ("--statistics", folder / "statistics.safetensors", *sampling, *SAMPLING)
    report = ("--report", folder / "table.html") if setting == "ddpm" else ()
    code = msfp("evaluate", folder / "tuned", "--original", folder / "plain", *words,
                "--json", folder / "table.json", *report)  # fmt: skip
    assert code == 0
    found = json.loads((folder / "table.json").read_text())
    assert found["features"] == "pixels"
    # The distances are those of the PNG files that other tools would be given.
    for name, model, seed in (("data_set", "tuned", 7), ("data_set_other", "plain", 8)):
        images = folder / f"images-{name}"
        code = msfp("sample", folder / model, "--images", images, *sampling, "--count", 5,
                    "--seed", seed)  # fmt: skip
        assert code == 0
        file = folder / f"{name}.safetensors"
        size = ("--size", SIZES[setting])
        assert msfp("statistics", images, "--features", "pixels", *size, "--output", file) == 0
        one, other = (
            DatasetStatistics.load(folder / each).statistics
            for each in (f"{name}.safetensors", "statistics.safetensors")
        )
        assert found[name] == pytest.approx(frechet_distance(one, other), rel=1e-5)
    if report:
        page = (folder / "table.html").read_text()
        assert "Frechet distance from the data set" in page
        assert "5 images, from 9 of the data set" in page
    assert "More images than the 192 features" in capsys.readouterr().out


def test_the_first_and_last_layers_have_eight_bits_and_others_four(walked):
    setting, folder = walked
    facts = {each.layer: each.weight.bits for each in inspect_layers(folder / "w4a4")}
    ends = ENDS["dit" if setting == "dit" else "unet"]
    assert {name for name, bits in facts.items() if bits == 8} == ends
    assert set(facts.values()) == {4, 8}
    assert "encoder_hid_proj" not in facts
    assert any(name.endswith("to_q") for name in facts)


def test_fine_tuning_adds_a_router_among_two_loras(walked):
    _, folder = walked
    assert routing_of(denoiser_of(load(folder / "w4a4"))) is None
    assert routing_of(denoiser_of(load(folder / "tuned"))) is not None


def test_sampling_resumes_where_it_stopped(walked):
    setting, folder = walked
    sampling, _ = calls(setting, folder)
    words = ("sample", folder / "w4a4", "--images", folder / "again", *sampling)
    assert msfp(*words, "--count", 3) == 0
    first = {file.name: file.read_bytes() for file in (folder / "again").iterdir()}
    (folder / "again" / "000002.png").unlink()
    assert msfp(*words, "--count", 5) == 0
    all_of_them = {file.name: file.read_bytes() for file in (folder / "again").iterdir()}
    assert sorted(all_of_them) == [f"{number:06}.png" for number in range(5)]
    assert first.items() <= all_of_them.items()


def test_an_interruption_says_where_the_images_are(tmp_path, monkeypatch, capsys):
    write = PngFolder.write

    def interrupted(folder, images, first):
        if first > 0:
            raise KeyboardInterrupt
        write(folder, images, first)

    monkeypatch.setattr(PngFolder, "write", interrupted)
    words = ("--count", 4, "--batch", 2, "--steps", 1, "--images", tmp_path / "out")
    assert msfp("sample", "digits", *words) == 130
    message = "out holds the finished images; run the same command to resume"
    assert message in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.rglob("*.png")) == ["000000.png", "000001.png"]


@pytest.mark.slow
def test_the_default_refines_from_the_same_calibration(tmp_path):
    stand_in("ldm-class", tmp_path).save_pretrained(tmp_path / "plain")
    sampling, _ = calls("ldm-class", tmp_path)
    words = ["quantize", tmp_path / "plain", *sampling, "--count", 3,
             "--calibration", tmp_path / "c.safetensors"]  # fmt: skip
    for glob in ("encoder_hid_proj", "*.conv_shortcut", "*.downsamplers"):
        words += ["--exclude", glob]
    for name, more in (("nearest", ("--refine", "none")), ("refined", ())):
        assert msfp(*words, *more, "--output", tmp_path / name) == 0
    one, other = (load(tmp_path / name).unet for name in ("nearest", "refined"))
    weights = [unet.mid_block.resnets[0].conv1.weight for unet in (one, other)]
    assert not torch.equal(*weights)
    assert not any("conv_shortcut" in each.layer for each in inspect_layers(tmp_path / "refined"))


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm++"])
@pytest.mark.parametrize("setting", ["ddpm", "ddim"])
def test_a_checkpoint_samples_with_the_sampler_it_was_calibrated_on(setting, name, tmp_path):
    model = tmp_path / "plain"
    stand_in(setting, tmp_path).save_pretrained(model)
    weights = ("--activation-bits", "none", "--refine", "none", "--end-bits", 4)
    words = (*weights, "--include", "mid_block", "--sampler", name)
    code = msfp("quantize", model, *words, "--output", tmp_path / "w4")
    assert code == 0
    words = ("--steps", 3, "--count", 2)
    assert msfp("sample", tmp_path / "w4", *words, "--output", tmp_path / "kept.png") == 0
    named = ("--sampler", name, "--output", tmp_path / "named.png")
    assert msfp("sample", tmp_path / "w4", *words, *named) == 0
    assert (tmp_path / "kept.png").read_bytes() == (tmp_path / "named.png").read_bytes()


def statistics(folder, size=16, network="pixels"):
    folder.mkdir(exist_ok=True)
    for number in range(2):
        Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(folder / f"{number}.png")
    file = folder / "statistics.safetensors"
    code = msfp("statistics", folder, "--features", network, "--size", size, "--output", file)
    assert code == 0
    return file


def latent(tmp_path):
    stand_in("ldm-vq", tmp_path).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture(scope="module")
def digits_at_four_bits(tmp_path_factory):
    """A checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("digits") / "w4"
    words = ("--activation-bits", "none", "--refine", "none", "--output", folder)
    assert msfp("quantize", "digits", *words) == 0
    return folder


def test_interrupted_statistics_resume_from_their_state(tmp_path, monkeypatch, capsys):
    file, state = statistics(tmp_path / "images"), tmp_path / "s.safetensors"
    words = ("statistics", tmp_path / "images", "--features", "pixels", "--size", 16,
             "--output", tmp_path / "again.safetensors", "--state", state)  # fmt: skip
    monkeypatch.setattr("msfp.support.autosave.SAVE_SECONDS", 0)
    monkeypatch.setattr("msfp.support.autosave.SAVE_SHARE", math.inf)
    monkeypatch.setattr("msfp.support.image_files.READ_AT_ONCE", 1)
    update = FeatureMoments.update

    def stopped_after_one(self, features):
        if self.count == 1:
            raise KeyboardInterrupt
        update(self, features)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureMoments, "update", stopped_after_one)
        assert msfp(*words) == 130
    assert {each.name for each in tmp_path.iterdir()} == {"images", state.name}
    assert msfp(*words) == 0
    assert not state.exists()
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    (tmp_path / "other.safetensors").write_bytes(file.read_bytes())
    new = ("--output", tmp_path / "new.safetensors", "--state", tmp_path / "other.safetensors")
    assert msfp(*words[:6], *new) == 2
    assert (
        "other.safetensors must be a state of msfp statistics, not statistics"
        in capsys.readouterr().err
    )


BAD = {
    "size": (
        lambda t, w4: ["evaluate", w4, "--original", "digits", "--statistics",
                       statistics(t / "r", 8), "--count", 2, "--steps", 1],
        "statistics must be of images as large as the model's, 16x16, not 8x8",
    ),
    "features": (
        lambda t, w4: ["evaluate", w4, "--original", "digits", "--features",
                       "torch:square", "--statistics", statistics(t / "r")],
        r"features must have shape",
    ),
    "function": (
        lambda t, _: ["statistics", statistics(t / "r").parent, "--features", "torch:trace",
                      "--size", 16, "--output", t / "x.safetensors"],
        "features cannot be computed of images of shape",
    ),
    "statistics": (
        lambda t, _: ["evaluate", t, "--original", "digits", "--statistics", t / "none"],
        "none cannot be read as statistics of a data set",
    ),
    "state": (
        lambda t, _: ["statistics", statistics(t / "r").parent, "--features", "pixels", "--size",
                      16, "--output", t / "x.safetensors", "--state", t / "x.safetensors"],
        "state and output must be different files",
    ),
    "no images": (
        lambda t, _: ["statistics", t, "--features", "pixels", "--size", 16,
                      "--output", t / "x.safetensors"],
        "must hold at least 2 files",
    ),
    "where to": (lambda *_: ["sample", "digits"], "one of the arguments --output --images is"),
    "dtype": (
        lambda t, _: ["quantize", latent(t), "--dtype", "float16", "--output", t / "x"],
        "dtype must be float32 for LDMPipeline of diffusers, not float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_two(case, digits_at_four_bits, tmp_path, capsys):
    words, message = BAD[case]
    assert_refused(words(tmp_path, digits_at_four_bits), message, tmp_path, capsys)


def test_a_torchscript_network_is_the_features_of_both_commands(digits_at_four_bits, tmp_path):
    network = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())
    torch.jit.script(network).save(tmp_path / "network.pt")
    file = statistics(tmp_path / "r", network=tmp_path / "network.pt")
    words = ("--statistics", file, "--count", 4, "--steps", 1, "--json", tmp_path / "a.json")
    assert msfp("evaluate", digits_at_four_bits, "--original", "digits", *words) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["features"].endswith("network.pt")
    assert found["data_set"] > 0
