"""Stand-ins of the public pipelines: the same classes and settings, tiny, of random weights."""

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from families import BLOCKS, autoencoder, conditional_unet, make, pipeline

from msfp.pipelines.class_conditional import ClassConditionalLDMPipeline

CLASSES = 4


def vq_autoencoder():
    return VQModel(
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        num_vq_embeddings=16,
        vq_embed_dim=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        scaling_factor=1.0,
    ).eval()


def latent_schedule():
    """That of Rombach et al. (CVPR 2022)."""
    return DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
    )


def ddpm():
    return DDPMPipeline(make("unet"), DDPMScheduler())


def ddim():
    return DDIMPipeline(make("unet"), DDIMScheduler())


def ldm_vq():
    return LDMPipeline(vq_autoencoder(), make("unet"), latent_schedule())


def ldm_kl():
    unet = UNet2DModel(
        **BLOCKS,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return LDMPipeline(autoencoder(4), unet.eval(), latent_schedule())


def ldm_class():
    unet = conditional_unet(
        in_channels=3,
        out_channels=3,
        encoder_hid_dim=CLASSES + 1,
        encoder_hid_dim_type="text_proj",
    )
    return ClassConditionalLDMPipeline(vq_autoencoder(), unet.eval(), latent_schedule())


PIPELINES = {"stable-diffusion": "conditional_unet", "dit": "dit"}
MAKERS = {"ddpm": ddpm, "ddim": ddim, "ldm-vq": ldm_vq, "ldm-kl": ldm_kl, "ldm-class": ldm_class}


def stand_in(setting, folder):
    """A pipeline of a setting; a folder is needed to write a vocabulary to."""
    torch.manual_seed(0)
    if setting in PIPELINES:
        return pipeline(PIPELINES[setting], folder)
    pipe = MAKERS[setting]()
    pipe.set_progress_bar_config(disable=True)
    return pipe
