import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from msfp import FinetuneConfig, InputError, finetune, load, save, seal
from msfp.checkpoint import atomic_folder, check_output, checksum, packed_size

SAMPLE = """
import sys, torch, msfp
torch.set_num_threads({threads})
images = msfp.Sampler(steps=4, batch=8)(msfp.load(sys.argv[1]), 8, 3)
torch.save(images, sys.argv[2])
"""


@pytest.fixture
def routed(quantized, trajectories):
    """A fine-tuned pipeline with a hub of two."""
    pipe, _ = quantized()
    finetune(pipe.unet, trajectories, FinetuneConfig(hub=2, rank=2, steps=3, batch=4))
    return pipe


@pytest.fixture
def saved(quantized, tmp_path):
    pipe, _ = quantized()
    seal(pipe.unet)
    save(pipe, tmp_path / "model")
    return tmp_path / "model"


def test_a_new_process_samples_bit_equal(routed, sampler, tmp_path):
    expected = sampler(routed, 8, 3)
    save(routed, tmp_path / "model")
    code = SAMPLE.format(threads=torch.get_num_threads())
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "images.pt")]
    subprocess.run(command, check=True)  # noqa: S603
    assert torch.equal(torch.load(tmp_path / "images.pt"), expected)


def test_the_file_is_close_to_four_bits_for_each_parameter(saved, reference):
    parameters = sum(p.numel() for p in reference.unet.parameters())
    size = (saved / "unet" / "msfp.safetensors").stat().st_size
    assert size < 1.15 * parameters / 2
    assert size == pytest.approx(packed_size(load(saved).unet), rel=0.05)


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    save(load(saved), tmp_path / "again")
    for name in ("unet/msfp.safetensors", "unet/msfp.json", "scheduler/scheduler_config.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_open_denoiser_is_not_saved(quantized, tmp_path):
    with pytest.raises(InputError, match="seal the denoiser before it is saved"):
        save(quantized()[0], tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_plain_denoiser_is_not_saved(reference, tmp_path):
    with pytest.raises(InputError, match=r"call msfp\.quantize first"):
        save(reference, tmp_path / "model")


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(saved):
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    with pytest.raises(InputError, match="exists and is not empty"):
        save(load(saved), saved)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("written")
        raise error
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_made_are_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for path in ("file", "file/x", "file/x/y", "link", "empty"):
        with pytest.raises(InputError, match="output"):
            check_output(tmp_path / path)
    check_output(tmp_path / "new" / "folder")


def test_a_half_precision_denoiser_is_not_saved(quantized, tmp_path):
    pipe, _ = quantized()
    seal(pipe.unet)
    pipe.unet.conv_norm_out.half()
    with pytest.raises(InputError, match=r"must be float32 to be saved, it has torch\.float16"):
        save(pipe, tmp_path / "model")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a checkpoint"):
        load(tmp_path)


def rewrite(folder, description):
    """Write a changed description with a checksum that fits, as a wrong program would."""
    tensor_file = folder / "unet" / "msfp.safetensors"
    description["checksum"] = checksum(description, tensor_file)
    (folder / "unet" / "msfp.json").write_text(json.dumps(description))


def describe(folder):
    return json.loads((folder / "unet" / "msfp.json").read_text())


def damage_json(change):
    def apply(folder):
        description = describe(folder)
        change(description)
        rewrite(folder, description)

    return apply


def damage_tensors(change):
    def apply(folder):
        file = folder / "unet" / "msfp.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        rewrite(folder, describe(folder))

    return apply


def replace_tensor(name, tensor):
    return damage_tensors(lambda tensors: tensors.update({name: tensor}))


def truncate(folder):
    file = folder / "unet" / "msfp.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(folder):
    file = folder / "unet" / "msfp.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)


def tamper_with_json(folder):
    file = folder / "unet" / "msfp.json"
    file.write_text(file.read_text().replace("E2M2U", "E3M1U"))


def other_library(folder):
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    index["unet"] = ["antigravity", "UNet2DModel"]
    file.write_text(json.dumps(index))


UNSIGNED = "down_blocks.0.resnets.0.conv1"
DAMAGE = {
    "truncated": (truncate, "checksum"),
    "flipped byte": (flip_a_byte, "checksum"),
    "tampered": (tamper_with_json, "checksum"),
    "no tensors": (lambda folder: (folder / "unet" / "msfp.safetensors").unlink(), "corrupt"),
    "no json": (lambda folder: (folder / "unet" / "msfp.json").write_text("{"), "corrupt"),
    "a list": (lambda folder: (folder / "unet" / "msfp.json").write_text("[]"), "format version"),
    "version": (damage_json(lambda d: d.update(format_version=99)), "format version 99"),
    "library": (other_library, "must be a class of diffusers, not of antigravity"),
    "format": (damage_json(lambda d: d["layers"]["conv_in"].update(weight_format="E9")), "E9"),
    "layer": (damage_json(lambda d: d["layers"].pop("conv_in")), "entries|left over"),
    "no entries": (damage_json(lambda d: d["layers"]["conv_in"].update(entries=0)), "corrupt"),
    "missing": (damage_tensors(lambda t: t.pop("conv_in.codes")), r"conv_in\.codes"),
    "no zero point": (
        damage_tensors(lambda t: t.pop(f"{UNSIGNED}.input_zero_point")),
        "zero_point",
    ),
    "extra": (replace_tensor("extra", torch.ones(1)), "extra"),
    "short": (
        damage_tensors(lambda t: t.update({"conv_in.codes": t["conv_in.codes"][:-1].clone()})),
        "conv_in|bytes",
    ),
    "bias": (replace_tensor("conv_in.bias", torch.ones(3)), r"conv_in\.bias"),
    "wide bias": (replace_tensor("conv_in.bias", torch.ones(32).double()), r"conv_in\.bias"),
    "scales": (replace_tensor("conv_in.weight_scale", torch.ones(3)), r"conv_in\.weight_scale"),
    "nan": (replace_tensor("conv_in.input_scale", torch.tensor(torch.nan)), "finite"),
    "vector": (replace_tensor("conv_in.input_scale", torch.ones(16)), "scalars"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_what_is_wrong(saved, damage):
    change, message = DAMAGE[damage]
    change(saved)
    with pytest.raises(InputError, match=message) as caught:
        load(saved)
    assert len(str(caught.value).splitlines()) == 1
