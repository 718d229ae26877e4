import pytest
import torch
from tiny import tiny_pipeline

from msfp import InputError
from msfp.pipelines.weight_files import cast_bytes


def test_what_loading_casts_is_what_has_another_dtype(tmp_path):
    pipe = tiny_pipeline()
    numbers = sum(p.numel() for p in pipe.unet.parameters())
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("unet/*.safetensors"))) > 1
    assert cast_bytes(tmp_path, torch.float32) == 0
    assert cast_bytes(tmp_path, torch.bfloat16) == 2 * numbers
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert cast_bytes(tmp_path, torch.float32) == 0  # those without a variant are loaded
    for file in tmp_path.glob("unet/*"):
        if ".fp16." not in file.name and file.name != "config.json":
            file.unlink()
    assert cast_bytes(tmp_path, torch.float32) == 4 * numbers


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"0" * 20)
    with pytest.raises(InputError, match=r"model\.safetensors is not a whole safetensors file"):
        cast_bytes(tmp_path, torch.float32)
