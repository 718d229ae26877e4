import torch
from tiny import tiny_pipeline

import msfp
from msfp.cli.main import main

QUICK = ("--steps", "2", "--count", "4", "--batch", "4")


def test_a_dry_run_prints_what_the_command_takes_and_writes_nothing(tmp_path, capsys):
    assert main(["quantize", "digits", *QUICK, "--output", str(tmp_path / "q"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for part in ("UNet2DModel: 65 layers are quantized", "W4A4", "E2M2U", "refinement", "Disk:"):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_rounding_alone_has_no_refinement(tmp_path, capsys):
    words = ["--refine", "none", "--offload", "--output", str(tmp_path / "q"), "--dry-run"]
    assert main(["quantize", "digits", *QUICK, *words]) == 0
    text = capsys.readouterr().out
    assert "search" in text
    assert "refinement" not in text


def test_shards_are_read_and_offloading_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("msfp.support.paging.SMALL", 64)
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "pipe", max_shard_size="20KB")
    few = [f"--include={glob}" for glob in ("conv_in", "conv_out", "*.conv1")]
    words = ["quantize", str(tmp_path / "pipe"), "--refine-samples=4", *few, *QUICK, "--output"]
    assert main([*words, str(tmp_path / "plain")]) == 0
    assert main([*words, str(tmp_path / "away"), "--offload"]) == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    one, other = (tmp_path / folder / name for folder in ("plain", "away"))
    assert one.read_bytes() == other.read_bytes()
    assert {each.name for each in tmp_path.iterdir()} == {"pipe", "plain", "away"}
    pipe = msfp.load(tmp_path / "away")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list(tmp_path.glob("shards/unet/*.safetensors"))) > 1
    found, tensors = msfp.load(tmp_path / "shards").unet.state_dict(), pipe.unet.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in found.items())
