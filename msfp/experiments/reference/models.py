"""The reference models before training: their data, their networks and how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from msfp.experiments.reference.digits import IMAGE_SIZE, digits
from msfp.experiments.reference.photographs import CROP_SIZE, held_out_crops, training_crops
from msfp.pipelines.class_conditional import PixelDiTPipeline

DIGIT_CLASSES = 10
Data = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Images (n, channels, height, width) in [-1, 1] and their labels (n,)."""


@dataclass(frozen=True)
class ReferenceModel:
    """One reference model before training: its data, its network and its training settings.

    Attributes:
        name: Folder of the trained pipeline.
        data: Images and labels that it is trained on.
        build: Returns the untrained denoiser.
        pipeline: Wraps a denoiser and a scheduler.
        steps: Steps of AdamW.
        batch: Images in a step.
        learning_rate: Peak rate, after the warm-up.
        held_out: Images whose loss is printed during training; None if all images are trained on.
        classes: Number of classes that it is conditioned on; 0 for an unconditional model.
        prediction: What it predicts, in diffusers' words: the noise, "epsilon", or the velocity,
            "v_prediction" (Salimans and Ho, 2022).
        autocast: Whether the forward pass of training runs in bfloat16.
        stored: dtype of the saved weights.
    """

    name: str
    data: Data
    build: Callable[[], nn.Module]
    pipeline: Callable[[nn.Module, DDPMScheduler], DiffusionPipeline]
    steps: int
    batch: int
    learning_rate: float
    held_out: Data | None = None
    classes: int = 0
    prediction: str = "epsilon"
    autocast: bool = False
    stored: torch.dtype = torch.float16


def noise_schedule(prediction: str = "epsilon") -> DDPMScheduler:
    """Return the noise schedule: 1000 linear steps, no clipping of samples."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type=prediction,
        clip_sample=False,
    )


def digits_unet() -> UNet2DModel:
    """Return a UNet of 1.74 million parameters with one attention level."""
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        act_fn="silu",
    )


def colour_unet() -> UNet2DModel:
    """Return a UNet of 5.47 million parameters with attention at 8x8 and 4x4 pixels."""
    return UNet2DModel(
        sample_size=CROP_SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 128, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
        act_fn="silu",
    )


def digits_transformer() -> DiTTransformer2DModel:
    """Return a DiT of 1.6 million parameters: 8 blocks of width 96 on 2x2 patches.

    The label 10 means "no class", for classifier-free guidance.
    """
    return DiTTransformer2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        patch_size=2,
        num_layers=8,
        num_attention_heads=6,
        attention_head_dim=16,
        num_embeds_ada_norm=DIGIT_CLASSES,
        norm_num_groups=8,
    )


DIGITS = ReferenceModel(
    "digits-ddpm", digits, digits_unet, DDPMPipeline, 4000, 64, 1.5e-3, stored=torch.float32
)
# It predicts velocities: an error of 0.01 in the mean colour of a predicted noise would become an
# error of 1.5 in the first x0 of DDIM.
COLOUR = ReferenceModel(
    "colour-ddpm",
    training_crops,
    colour_unet,
    DDPMPipeline,
    steps=7000,
    batch=32,
    learning_rate=7e-4,
    held_out=held_out_crops,
    prediction="v_prediction",
    autocast=True,
)
DIGITS_DIT = ReferenceModel(
    "digits-dit",
    digits,
    digits_transformer,
    PixelDiTPipeline,
    steps=5000,
    batch=64,
    learning_rate=1e-3,
    classes=DIGIT_CLASSES,
)
REFERENCE_MODELS = {model.name: model for model in (DIGITS, COLOUR, DIGITS_DIT)}
