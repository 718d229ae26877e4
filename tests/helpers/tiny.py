"""A denoiser so small that training it takes a second."""

import copy

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.models import UNet2DModel

from msfp import QuantizationConfig, Sampler, finetune, quantize

SAMPLER = Sampler(steps=4, batch=4)
SHORT = {"rank": 2, "steps": 6, "batch": 8}
EVERYTHING = {
    **SHORT, "hub": 2, "ema": 0.5, "evaluate_every": 2, "save_every": 1, "clip": 0.1,
    "dfa_power": 1.0,
}  # fmt: skip


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
    """A trainable quantized copy of a pipeline, at 4 bits."""
    pipe = copy.deepcopy(pipe)
    quantize(pipe, QuantizationConfig(refine=None), calibration=SAMPLER.calls(4, seed=1))
    return pipe


def tuned(pipe, path, config, **more):
    """The state of a copy of a pipeline's denoiser after fine-tuning, and the history."""
    pipe = copy.deepcopy(pipe)
    history = finetune(pipe, config, trajectories=path, **more)
    return pipe.unet.state_dict(), history
