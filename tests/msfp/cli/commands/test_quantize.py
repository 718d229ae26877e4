import copy

import pytest
import torch
from families import call, pipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from refusals import assert_refused
from tiny import tiny_pipeline

import msfp
from msfp import QuantizationConfig, load, pack, quantize
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


def test_loras_are_fused_with_the_weights_before_they_are_quantized(tmp_path, capsys):
    pipe = pipeline("conditional_unet", tmp_path / "text")
    pipe.save_pretrained(tmp_path / "plain")
    files = []
    for name, targets in (("a", ["to_q"]), ("b", ["to_k", "to_q"])):
        unet = copy.deepcopy(pipe.unet)
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        inject_adapter_in_model(config, unet)
        files.append(tmp_path / name / "pytorch_lora_weights.safetensors")
        pipe.save_lora_weights(tmp_path / name, get_peft_model_state_dict(unet))
    for file, weight in zip(files, (1.0, 0.5), strict=True):
        pipe.load_lora_weights(file)
        pipe.fuse_lora(lora_scale=weight)
        pipe.unload_lora_weights()
    quantize(pipe, QuantizationConfig(activation_bits=None, refine=None))
    pack(pipe)
    words = ["--lora", str(files[0]), "--lora", f"{files[1]}=0.5", "--output", tmp_path / "q"]
    words += ["--activation-bits", "none", "--refine", "none", "--dtype", "float32"]
    assert main([str(word) for word in ("quantize", tmp_path / "plain", *words)]) == 0
    assert f"The LoRA {files[1]} is in the weights, times 0.5" in capsys.readouterr().out
    assert torch.equal(call(load(tmp_path / "q").unet), call(pipe.unet))


@pytest.mark.parametrize(("model", "message"), [
    ("plain", r"lora no\.bin=x cannot be loaded: "),
    ("digits", "lora cannot be given: diffusers loads none into DDIMPipeline"),
])  # fmt: skip
def test_a_lora_that_cannot_be_loaded_is_refused(model, message, tmp_path, capsys):
    if model == "plain":
        pipeline("conditional_unet", tmp_path / "text").save_pretrained(tmp_path / model)
        model = tmp_path / model
    words = ["quantize", model, "--lora", "no.bin=x", "--output", tmp_path / "q"]
    assert_refused(words, message, tmp_path, capsys)


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
