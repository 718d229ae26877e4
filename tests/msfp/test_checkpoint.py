import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from msfp import FinetuneConfig, InputError, finetune, load, save, seal
from msfp.checkpoint import atomic_folder, packed_size

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


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a checkpoint"):
        load(tmp_path)


def damage_json(change):
    def apply(folder):
        file = folder / "unet" / "msfp.json"
        description = json.loads(file.read_text())
        change(description)
        file.write_text(json.dumps(description))

    return apply


def damage_tensors(change):
    def apply(folder):
        file = folder / "unet" / "msfp.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return apply


def truncate(folder):
    file = folder / "unet" / "msfp.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "truncated": (truncate, "corrupt"),
    "no tensors": (lambda folder: (folder / "unet" / "msfp.safetensors").unlink(), "corrupt"),
    "no json": (lambda folder: (folder / "unet" / "msfp.json").write_text("{"), "corrupt"),
    "a list": (lambda folder: (folder / "unet" / "msfp.json").write_text("[]"), "format version"),
    "version": (damage_json(lambda d: d.update(format_version=99)), "format version 99"),
    "format": (damage_json(lambda d: d["layers"]["conv_in"].update(weight_format="E9")), "E9"),
    "layer": (damage_json(lambda d: d["layers"].pop("conv_in")), "left over"),
    "missing": (damage_tensors(lambda t: t.pop("conv_in.codes")), r"conv_in\.codes"),
    "extra": (damage_tensors(lambda t: t.update(extra=torch.ones(1))), "extra"),
    "short": (
        damage_tensors(lambda t: t.update({"conv_in.codes": t["conv_in.codes"][:-1].clone()})),
        "conv_in|bytes",
    ),
    "bias": (damage_tensors(lambda t: t.update({"conv_in.bias": torch.ones(3)})), r"conv_in\.bias"),
    "scales": (
        damage_tensors(lambda t: t.update({"conv_in.weight_scale": torch.ones(3)})),
        r"conv_in\.weight_scale",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_what_is_wrong(saved, damage):
    change, message = DAMAGE[damage]
    change(saved)
    with pytest.raises(InputError, match=message):
        load(saved)
