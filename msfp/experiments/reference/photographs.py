"""The data of the colour model: 32x32 crops of the photographs in scikit-learn and scikit-image."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from skimage import data
from sklearn.datasets import load_sample_image

CROP_SIZE = 32
TRAINING_CROPS = 24_000
HELD_OUT_CROPS = 512
HELD_OUT_WIDTH = 80
SMALLEST_SIDE = 48


@functools.cache
def photographs() -> dict[str, torch.Tensor]:
    """Return the photographs by name, each of shape (3, height, width), float32 in [-1, 1].

    All six install with their package; nothing is downloaded.

    Example:
        >>> {name: tuple(image.shape) for name, image in photographs().items()}["chelsea"]
        (3, 300, 451)
    """
    images = {
        "china": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
        "astronaut": data.astronaut(),
        "chelsea": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
    }
    return {
        name: torch.tensor(image).permute(2, 0, 1) / 127.5 - 1 for name, image in images.items()
    }


@functools.cache
def training_crops() -> tuple[torch.Tensor, torch.Tensor]:
    """Return crops of every photograph without its right edge, and the photographs' numbers.

    A crop is a square. Its side is drawn from a log-uniform distribution between 48 pixels and the
    photograph's height. It is mirrored with probability 1/2. An antialiasing bilinear filter
    reduces it to 32x32. The seed is fixed: every call returns the same crops.

    Returns:
        Images of shape (24000, 3, 32, 32), float32 in [-1, 1], and labels of shape (24000,), int64.
    """
    kept = [image[:, :, :-HELD_OUT_WIDTH] for image in photographs().values()]
    return _crops(kept, TRAINING_CROPS, seed=0)


@functools.cache
def held_out_crops() -> tuple[torch.Tensor, torch.Tensor]:
    """Return crops of the right 80 columns of every photograph, which training never uses.

    Returns:
        Images of shape (512, 3, 32, 32), float32 in [-1, 1], and labels of shape (512,), int64.

    Example:
        >>> images, labels = held_out_crops()
        >>> images.shape, labels.max().item()
        (torch.Size([512, 3, 32, 32]), 5)
    """
    edges = [image[:, :, -HELD_OUT_WIDTH:] for image in photographs().values()]
    return _crops(edges, HELD_OUT_CROPS, seed=1)


def _crops(images: list[torch.Tensor], count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` random crops, equally many of each image, and the images' numbers."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(images)
    return torch.stack([_crop(images[label], draw) for label in labels]), labels


def _crop(image: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return one random square of an image, reduced to (3, 32, 32)."""
    height, width = image.shape[1:]
    scale, down, right, mirror = torch.rand(4, generator=draw).tolist()
    side = round(SMALLEST_SIDE * math.exp(scale * math.log(min(height, width) / SMALLEST_SIDE)))
    top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
    square = image[:, top : top + side, left : left + side]
    small = F.interpolate(
        square[None], size=CROP_SIZE, mode="bilinear", align_corners=False, antialias=True
    )[0]
    return (small.flip(-1) if mirror < 0.5 else small).clamp(-1, 1)
