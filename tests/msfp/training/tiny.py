"""A denoiser so small that training it takes a second."""

import copy

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.models import UNet2DModel

from msfp import QuantizationConfig, Sampler, quantize

SAMPLER = Sampler(steps=4, batch=4)


def tiny_pipeline():
    """A DDIM pipeline of a UNet with two levels, attention and random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_quantized(pipe):
    """An open quantized copy of a pipeline, at 4 bits."""
    pipe = copy.deepcopy(pipe)
    quantize(pipe, QuantizationConfig(refine=None), calibration=SAMPLER.calls(4, seed=1))
    return pipe
