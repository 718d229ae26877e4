"""What a new process makes of files that were written by another.

Run by `scripts.forked`: the process has imported the packages, but has never held a model.
"""

from pathlib import Path

import torch
from diffusers import UNet2DModel
from families import FAMILIES, call, images, load_pipeline
from safetensors.torch import save_file

import msfp
from msfp.pipelines.denoiser import denoiser_of


def use_pipelines(_rank, folder: Path, dtype: torch.dtype, threads: int, output: Path) -> None:
    """Write the images and a prediction of each family's pipeline."""
    torch.set_num_threads(threads)
    outputs = {}
    for family in FAMILIES:
        pipe = load_pipeline(folder / family, torch_dtype=dtype)
        outputs[f"{family} images"] = images(pipe).contiguous()
        outputs[f"{family} prediction"] = call(denoiser_of(pipe)).contiguous()
    save_file(outputs, output)


def use_unets(
    _rank, folder: Path, names: list[str], dtype: torch.dtype, threads: int, output: Path
) -> None:
    """Write a prediction of each of several unets in one folder."""
    torch.set_num_threads(threads)
    outputs = {}
    for name in names:
        unet = UNet2DModel.from_pretrained(folder / name, torch_dtype=dtype)
        outputs[name] = call(unet).contiguous()
    save_file(outputs, output)


def sample(_rank, folder: Path, threads: int, output: Path) -> None:
    """Write images of a pipeline that msfp saved."""
    torch.set_num_threads(threads)
    images = msfp.Sampler(steps=4, batch=8)(msfp.load(folder), 8, 3)
    save_file({"images": images}, output)
