import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, VQModel
from external import CLASSES, latent_schedule, ldm_class, ldm_vq
from families import conditional_unet
from original_names import original_checkpoint

from msfp import InputError, Sampler, load, quantize, record_trajectories, seal
from msfp.checkpoint import save
from msfp.class_pipeline import ClassConditionalLDMPipeline, pipeline_class
from msfp.config import QuantizationConfig


def images(pipe, labels=(1, 2), **options):
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe(labels, generator=generator, num_inference_steps=2, output_type="np",
                **options).images  # fmt: skip


def test_labels_are_looked_up_and_none_is_the_last_class():
    pipe = ldm_class()
    sampler = Sampler(steps=2, batch=2, conditions=(1, 3), guidance_scale=2.0)
    path = record_trajectories(pipe, sampler.calls(2, seed=0))
    rows = path.conditions["encoder_hidden_states"].values
    assert rows.shape == (1, 4, 1, CLASSES + 1)
    assert rows[0, :, 0].argmax(1).tolist() == [1, 3, CLASSES, CLASSES]
    layer = pipe.unet.encoder_hid_proj
    table = layer.weight.T + layer.bias
    assert torch.allclose(layer(rows[0, :, 0]), table[[1, 3, CLASSES, CLASSES]])


def test_guidance_moves_away_from_the_unconditional_branch():
    pipe = ldm_class()
    sampler = Sampler(steps=1, batch=1, conditions=(1,), guidance_scale=4.0)
    conditional, none = record_trajectories(pipe, sampler.calls(1, 0)).predictions[0]
    asked = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda noise, *rest: asked.append(noise) or step(noise, *rest)
    sampler(pipe, 1, 0)
    assert torch.allclose(asked[0][0], none + 4 * (conditional - none), atol=1e-5)


def test_without_guidance_the_network_is_called_once():
    pipe = ldm_class()
    sampler = Sampler(steps=2, batch=2, conditions=(1, 3), guidance_scale=1.0)
    assert record_trajectories(pipe, sampler.calls(2, 0)).samples.shape[1] == 2


def test_folders_in_both_precisions_are_loaded_by_their_names(tmp_path):
    pipe = ldm_class()
    pipe.save_pretrained(tmp_path / "plain")
    kind = pipeline_class(tmp_path / "plain")
    assert kind is ClassConditionalLDMPipeline
    again = kind.from_pretrained(tmp_path / "plain")
    assert (images(again) == images(pipe)).all()
    config = QuantizationConfig(activations=None, refine=None, exclude=("encoder_hid_proj",))
    quantize(pipe, config)
    seal(pipe.unet)
    save(pipe, tmp_path / "packed")
    assert (images(load(tmp_path / "packed")) == images(pipe)).all()
    ldm_vq().save_pretrained(tmp_path / "other")
    assert pipeline_class(tmp_path / "other") is not ClassConditionalLDMPipeline


def original_modules():
    """The U-Net and the autoencoder of the documentation, narrow."""
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=2, attention_head_dim=1,
        block_out_channels=(4, 8, 12, 16), norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        encoder_hid_dim=5, encoder_hid_dim_type="text_proj",
    )  # fmt: skip
    autoencoder = VQModel(
        block_out_channels=(4, 8, 8), layers_per_block=2, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        num_vq_embeddings=9, vq_embed_dim=3, scaling_factor=1.0,
    )  # fmt: skip
    torch.nn.init.zeros_(unet.encoder_hid_proj.bias)
    return unet.eval(), autoencoder.eval()


def test_the_documented_conversion_gives_the_original_weights(tmp_path, monkeypatch):
    unet, autoencoder = original_modules()
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": original_checkpoint(unet, autoencoder)}, "cin256-v2.ckpt")
    page = Path(__file__).parents[2] / "docs" / "external-models.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    code = next(block for block in blocks if "convert_ldm_unet_checkpoint" in block)
    empty = {"imagenet": copy.deepcopy(unet), "autoencoder": copy.deepcopy(autoencoder)}
    exec(code, {"torch": torch, "scheduler": latent_schedule(), **empty})  # noqa: S102
    converted = pipeline_class(Path("ldm-imagenet")).from_pretrained("ldm-imagenet")
    pipe = ClassConditionalLDMPipeline(autoencoder, unet, latent_schedule())
    for ours, theirs in ((converted.unet, unet), (converted.vqvae, autoencoder)):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    # Products of the last bit depend on where in memory the weights lie.
    np.testing.assert_allclose(images(converted), images(pipe), atol=1e-5)


def test_what_has_no_such_class_is_refused():
    with pytest.raises(InputError, match="must lie in 0 to 3, not"):
        images(ldm_class(), labels=[CLASSES])
    part = ldm_class()
    with pytest.raises(InputError, match="encoder_hid_dim_type must be 'text_proj', not None"):
        ClassConditionalLDMPipeline(part.vqvae, conditional_unet(), part.scheduler)
