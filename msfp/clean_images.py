"""A folder of images as a denoiser knows them: pixels from -1 to 1, or an autoencoder's latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.denoiser import denoiser_of
from msfp.errors import InputError
from msfp.image_folder import image_files, read_image
from msfp.sampling import Progress

AUTOENCODERS = ("vae", "vqvae")
LUMINANCE = (0.299, 0.587, 0.114)
"""Of red, green and blue (ITU-R BT.601, as in Pillow)."""


@torch.no_grad()
def clean_images(
    pipe: DiffusionPipeline,
    folder: Path,
    count: int,
    *,
    in_order: bool = False,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Read images as the denoiser of a pipeline is to predict them.

    Args:
        pipe: Its denoiser says how large images are, its autoencoder, if it has one, encodes them.
        folder: Image files, in it and in the folders in it.
        count: How many to take at most.
        in_order: Whether to take the first files, by their paths; otherwise they are spread over
            all files, which may be sorted by what they show.
        progress: Called with the number of images that were just read.

    Returns:
        Pixels in [-1, 1] or latents, float32, shape (count, channels, height, width). Images are
        cut to the central square and resized as by `read_image`.

    Raises:
        InputError: If there are no such files, one cannot be read, or the pipeline does not say
            what its denoiser reads.
    """
    files = image_files(folder)
    count = min(count, len(files))
    chosen = range(count) if in_order else [i * len(files) // count for i in range(count)]
    encoder = _autoencoder(pipe)
    size = _size(pipe, encoder)
    images = []
    for index in chosen:
        image = 2 * read_image(files[index], size)[None] - 1
        images.append(_pixels(pipe, image) if encoder is None else _latents(encoder, image))
        if progress is not None:
            progress(1)
    return torch.cat(images)


def _autoencoder(pipe: DiffusionPipeline) -> nn.Module | None:
    """Return what encodes the images of a pipeline, or None where its denoiser reads pixels."""
    parts = (getattr(pipe, name, None) for name in AUTOENCODERS)
    return next((part for part in parts if isinstance(part, nn.Module)), None)


def _size(pipe: DiffusionPipeline, encoder: Any) -> int:
    """Return the height and width of the images of a pipeline."""
    denoiser = denoiser_of(pipe)
    size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1 or not isinstance(size := sides.pop(), int):
        raise InputError(
            f"data can be given for denoisers whose config has a square sample_size, and that of "
            f"{type(denoiser).__name__} is {size}"
        )
    halvings = 0 if encoder is None else len(encoder.config.block_out_channels) - 1
    return size << halvings


def _pixels(pipe: DiffusionPipeline, image: torch.Tensor) -> torch.Tensor:
    """Return an image with the colours that a denoiser reads."""
    config: Any = denoiser_of(pipe).config
    if config.in_channels != 1:
        return image
    weights = torch.tensor(LUMINANCE).view(1, 3, 1, 1)
    return (weights * image).sum(dim=1, keepdim=True)


def _latents(encoder: Any, image: torch.Tensor) -> torch.Tensor:
    """Return what an autoencoder makes of an image, scaled as a denoiser reads it."""
    encoded = encoder.encode(image.to(encoder.device, encoder.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    shift = getattr(encoder.config, "shift_factor", None) or 0.0
    scaled: torch.Tensor = (latents.float().cpu() - shift) * encoder.config.scaling_factor
    return scaled
