"""Image files in the form of a denoiser's samples: pixels from -1 to 1, or latents."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, VQModel
from torch import nn

from msfp.errors import InputError
from msfp.pipelines.denoiser import denoiser_of
from msfp.support.image_files import image_files, read_image
from msfp.support.progress import Progress, counted, no_progress

AUTOENCODERS = ("vae", "vqvae")
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601, as in Pillow)."""


def chosen_files(folder: Path, count: int, conditions: int = 0) -> list[Path]:
    """Return image files of a folder and its subfolders, to train on.

    Args:
        folder: A folder with image files.
        count: Largest number of files to return.
        conditions: Number of prompts or labels. The files take them in turn, in the order of their
            paths. The number of files is a multiple of it if possible, so that a file gets the same
            condition again when the files repeat. If it is 0, the files are spread evenly over the
            folder, which may be sorted by content.

    Raises:
        InputError: If there are no image files, or fewer files than conditions.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in "abcde":
        ...     (folder / f"{name}.png").touch()
        >>> [file.stem for file in chosen_files(folder, 2)]
        ['a', 'c']
        >>> [file.stem for file in chosen_files(folder, 8, conditions=2)]
        ['a', 'b', 'c', 'd']
    """
    files = image_files(folder)
    if len(files) < conditions:
        raise InputError(
            f"data {folder} must have an image for each of the {conditions} prompts or labels, "
            f"not {len(files)}"
        )
    count = min(count, len(files))
    if conditions:
        return files[: (count - count % conditions) or count]
    return [files[index * len(files) // count] for index in range(count)]


@torch.no_grad()
def clean_images(
    pipe: DiffusionPipeline, files: list[Path], progress: Progress = no_progress
) -> torch.Tensor:
    """Read images in the form of the samples that a pipeline's denoiser predicts.

    Args:
        pipe: The pipeline. Its denoiser determines the size of the images. Its autoencoder, if it
            has one, encodes them.
        files: Image files. Images are cropped to the central square and resized, as by
            `read_image`.
        progress: Called after each image.

    Returns:
        Pixels in [-1, 1] or latents, float32, shape (files, channels, height, width).

    Raises:
        InputError: If a file cannot be read, or the form of the denoiser's samples is unknown.
    """
    encoder = _autoencoder(pipe)
    size = _size(pipe, encoder)
    reader: Any = denoiser_of(pipe) if encoder is None else encoder
    images = []
    done = counted(progress, "reading images", len(files))
    for file in files:
        image = _coloured(2 * read_image(file, size)[None] - 1, reader.config.in_channels)
        images.append(image if encoder is None else _latents(encoder, image))
        done(1)
    return torch.cat(images)


def _autoencoder(pipe: DiffusionPipeline) -> AutoencoderKL | VQModel | None:
    """Return the autoencoder of a pipeline in float32, or None if its denoiser reads pixels.

    Narrower dtypes may overflow in the autoencoder.
    """
    parts = (getattr(pipe, name, None) for name in AUTOENCODERS)
    encoder = next((part for part in parts if isinstance(part, nn.Module)), None)
    if encoder is None:
        return None
    if not isinstance(encoder, AutoencoderKL | VQModel):
        raise InputError(
            f"data can be encoded by AutoencoderKL or VQModel, not by {type(encoder).__name__}"
        )
    if encoder.dtype == torch.float32:
        return encoder
    wide: AutoencoderKL | VQModel = copy.deepcopy(encoder).float()
    return wide


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


def _coloured(image: torch.Tensor, channels: int) -> torch.Tensor:
    """Return an RGB image (1, 3, ...), or its luminance if the denoiser reads one channel."""
    if channels != 1:
        return image
    weights = torch.tensor(LUMINANCE).view(1, 3, 1, 1)
    return (weights * image).sum(dim=1, keepdim=True)


def _latents(encoder: Any, image: torch.Tensor) -> torch.Tensor:
    """Return the latents of an image, scaled as in the autoencoder's pipelines."""
    encoded = encoder.encode(image.to(encoder.device))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    latents = latents.cpu()
    mean, deviation = (_by_channel(encoder, f"latents_{name}", latents) for name in ("mean", "std"))
    shift = getattr(encoder.config, "shift_factor", None) or 0.0
    if mean is not None and deviation is not None:
        latents, shift = (latents - mean) / deviation, 0.0
    scaled: torch.Tensor = (latents - shift) * encoder.config.scaling_factor
    return scaled


def _by_channel(encoder: Any, name: str, latents: torch.Tensor) -> torch.Tensor | None:
    """Return the numbers of the channels of latents from a config, or None if it has none."""
    numbers = getattr(encoder.config, name, None)
    return None if numbers is None else torch.tensor(numbers, dtype=latents.dtype).view(1, -1, 1, 1)
