"""The code of docs/external-models.md that makes folders of checkpoints and of data sets."""

import copy
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import LDMPipeline, UNet2DConditionModel, UNet2DModel, VQModel
from external import latent_schedule
from original_names import attention_tensors, original_checkpoint
from PIL import Image

from msfp import Sampler
from msfp.pipelines.class_conditional import ClassConditionalLDMPipeline, pipeline_class
from msfp.support.image_files import image_files, read_image

PAGE = Path(__file__).parents[2] / "docs" / "external-models.md"
WIDTHS = (4, 8, 12, 16)


def code(*marks):
    """The blocks of the page that have the marks, one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return "\n".join(next(block for block in blocks if mark in block) for mark in marks)


def vq_autoencoder():
    """That of the page, narrow."""
    return VQModel(
        block_out_channels=(4, 8, 8), layers_per_block=2, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        num_vq_embeddings=9, vq_embed_dim=3, scaling_factor=1.0,
    ).eval()  # fmt: skip


def bedroom():
    """That of the page, narrow: heads of 4 channels, 2 of them and more."""
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=2, attention_head_dim=4,
        block_out_channels=WIDTHS, norm_num_groups=4,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    ).eval()  # fmt: skip


def imagenet():
    """That of the page, narrow."""
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=2, attention_head_dim=1,
        block_out_channels=WIDTHS, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        encoder_hid_dim=5, encoder_hid_dim_type="text_proj",
    )  # fmt: skip
    torch.nn.init.zeros_(unet.encoder_hid_proj.bias)
    return unet.eval()


MODELS = {
    "ldm-lsun-bedroom": (bedroom, "lsun_bedrooms.ckpt", LDMPipeline, ()),
    "ldm-imagenet": (imagenet, "cin256-v2.ckpt", ClassConditionalLDMPipeline, (1, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize("folder", MODELS)
def test_a_conversion_gives_the_original_weights(folder, averages, tmp_path, monkeypatch):
    make, file, kind, labels = MODELS[folder]
    unet, autoencoder = make(), vq_autoencoder()
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": original_checkpoint(unet, autoencoder, averages)}, file)
    empty = {make.__name__: copy.deepcopy(unet), "autoencoder": copy.deepcopy(autoencoder)}
    given = {"torch": torch, "scheduler": latent_schedule(), **empty}
    exec(code("def tensors_of", file), given)  # noqa: S102
    converted = pipeline_class(Path(folder)).from_pretrained(folder)
    pipe = kind(autoencoder, unet, latent_schedule())
    for ours, theirs in ((converted.unet, unet), (converted.vqvae, autoencoder)):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    # Products of the last bit depend on where in memory the weights lie.
    sampler = Sampler(steps=2, batch=2, conditions=labels)
    one, other = (sampler(each, 2, seed=0) for each in (converted, pipe))
    np.testing.assert_allclose(one, other, atol=1e-5)


def original_attention(x, tensors, head):
    """Attention among pixels as the latent-diffusion repository computes it."""
    flat = x.flatten(2)
    normal = F.group_norm(flat, 4, tensors["norm.weight"], tensors["norm.bias"], eps=1e-5)
    joint = F.conv1d(normal, tensors["qkv.weight"], tensors["qkv.bias"])
    # Heads first: each has its queries, keys and values next to each other.
    q, k, v = joint.reshape(-1, 3 * head, joint.shape[-1]).split(head, dim=1)
    weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(head), dim=-1)
    mixed = (v @ weights.transpose(1, 2)).reshape(flat.shape)
    return x + F.conv1d(mixed, tensors["proj_out.weight"], tensors["proj_out.bias"]).view_as(x)


@torch.no_grad()
def test_the_order_of_heads_is_that_of_the_original_formula():
    attention = bedroom().down_blocks[2].attentions[0]
    x = torch.randn(2, 12, 3, 3)
    expected = original_attention(x, attention_tensors(attention), head=4)
    assert attention.heads == 3
    torch.testing.assert_close(attention(x), expected)


def test_cifar_10_is_written_as_images_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 32, 32), np.uint8)
    for name, some in zip(("data_batch_1", "data_batch_2"), pixels, strict=True):
        batch = {b"data": some.reshape(3, 3072), b"labels": [0, 1, 2]}
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch, protocol=2))
    exec(code("cifar-10-batches-py"), {})  # noqa: S102
    files = image_files(Path("data/ddpm-cifar10-32"))
    read = torch.stack([read_image(file, 32) for file in files])
    assert np.array_equal((read * 255).double(), pixels.reshape(6, 3, 32, 32).astype(float))


def test_lsun_is_copied_whatever_the_kind_of_its_files(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    monkeypatch.chdir(tmp_path)
    with lmdb.open("bedroom_train_lmdb") as database, database.begin(write=True) as transaction:
        for number, kind in enumerate(("jpeg", "webp", "png")):
            Image.new("RGB", (9, 8), (40 * number,) * 3).save(tmp_path / "one", kind)
            transaction.put(f"key{number}".encode(), (tmp_path / "one").read_bytes())
    exec(code("import lmdb"), {})  # noqa: S102
    files = image_files(Path("data/ldm-lsun-bedroom"))
    read = [read_image(file, 8).mean().item() * 255 for file in files]
    assert read == pytest.approx([0, 40, 80], abs=2)


def test_the_first_caption_of_each_image_is_a_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ((9, 5, "A cat\n on a mat. "), (7, 2, "A dog."), (3, 5, "A cat."), (8, 2, "A hound."))
    annotations = [dict(zip(("id", "image_id", "caption"), row, strict=True)) for row in rows]
    Path("captions_val2014.json").write_text(json.dumps({"annotations": annotations}))
    exec(code("captions_val2014.json"), {})  # noqa: S102
    assert Path("captions.txt").read_text() == "A cat.\nA dog.\n"
