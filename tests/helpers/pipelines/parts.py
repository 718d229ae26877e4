"""What small pipelines are made of besides text: denoisers, autoencoders and given images."""

from typing import Any

import diffusers
import numpy as np
import torch
from denoisers import CASES
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from torch import nn

SIDE = 16
"""Width and height of an image; its latents have half of that."""
PLAIN: dict[str, Any] = {
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
"""What a UNet of Stable Diffusion has not, and one of Stable Diffusion XL has."""
SIMPLE: dict[str, Any] = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "transformer_layers_per_block": 1,
}
"""Blocks whose attention is to the text and the image together, as unCLIP and its heirs have."""
STABLE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
"""What schedulers of Stable Diffusion have."""


def net(name: str, **changes: Any) -> nn.Module:
    """Return a small denoiser of a class of diffusers, with some of its arguments changed.

    Unlike those of `denoisers`, two of them have different weights.
    """
    denoiser: nn.Module = getattr(diffusers, name)(**{**CASES[name].config, **changes})
    with torch.no_grad():
        for key, parameter in denoiser.named_parameters():
            if key.endswith("pad_token"):  # as memory was before
                parameter.normal_(std=0.1)
    return denoiser


def unet(**changes: Any) -> nn.Module:
    """Return a UNet of Stable Diffusion: its condition is text alone."""
    return net("UNet2DConditionModel", **{**PLAIN, **changes})


def autoencoder(channels: int = 4, **changes: Any) -> AutoencoderKL:
    """Return an autoencoder of images, with two pixels for each latent of some channels."""
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "latent_channels": channels,
        "sample_size": SIDE,
    }
    return AutoencoderKL(**{**settings, **changes})


def codebook(**changes: Any) -> VQModel:
    """Return an autoencoder of images whose latents are entries of a codebook."""
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "num_vq_embeddings": 18,
    }
    return VQModel(**{**settings, **changes})


def picture(seed: int = 1, side: int = SIDE) -> Image.Image:
    """Return an image of noise, equal for equal arguments."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def left(side: int = SIDE) -> Image.Image:
    """Return a mask of the left half of an image."""
    pixels = np.zeros((side, side), dtype=np.uint8)
    pixels[:, : side // 2] = 255
    return Image.fromarray(pixels)
