"""What pipelines return, as images: images, frames of videos, and sounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from msfp.errors import InputError

WINDOW = 1024
"""Most samples of a sound in one column of its spectrogram."""
RANGE = 80.0
"""Decibels from the darkest to the brightest number of a spectrogram."""
SOUNDS, VIDEOS, IMAGES = ("audio",), ("frame", "video"), ("image", "prediction")
"""Parts of the names of results."""
COLOURS = (1, 3)
"""Numbers of channels of images."""


def as_images(output: Any) -> torch.Tensor:
    """Return the result of a pipeline's call as images (count, channels, height, width) in [0, 1].

    The frames of a video stand side by side in one image. A sound is its spectrogram: frequencies
    from top to bottom, 80 dB from 0 to 1, and the channels one below the other.

    Args:
        output: What a pipeline of diffusers returned: its images, frames or sounds as arrays of
            numbers in [0, 1] (sounds in [-1, 1]), as tensors, or as images of PIL.

    Raises:
        InputError: If the result is none of these, such as the embeddings of a prior.

    Example:
        >>> from diffusers import ImagePipelineOutput
        >>> as_images(ImagePipelineOutput(images=np.zeros((2, 8, 16, 3)))).shape
        torch.Size([2, 3, 8, 16])
    """
    name, value = next(iter(output.items()), ("", None))
    if any(each in name for each in SOUNDS):
        return spectrograms(torch.as_tensor(_array(value)))
    if not any(each in name for each in IMAGES + VIDEOS) or "embed" in name:
        raise InputError(
            f"the pipeline must make images, videos or sounds: it returns {type(output).__name__}"
        )
    array = _array(value)
    while array.ndim < (5 if any(each in name for each in VIDEOS) else 4):
        array = array[..., None] if array.shape[-1] not in COLOURS else array[None]
    if array.ndim > 5 or array.shape[-1] not in COLOURS:
        raise InputError(f"the pipeline must make images, not arrays of the shape {array.shape}")
    if array.ndim == 5:  # (videos, frames, height, width, channels)
        array = np.concatenate(list(array.swapaxes(0, 1)), axis=2)
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def _array(value: Any) -> np.ndarray[Any, Any]:
    """Return images of any form as an array of float32, channels last."""
    if isinstance(value, Image.Image):
        return np.asarray(value, np.float32) / 255
    if isinstance(value, torch.Tensor):
        array: np.ndarray[Any, Any] = value.detach().cpu().float().numpy()
        return np.moveaxis(array, -3, -1) if array.ndim > 3 else array
    if isinstance(value, list | tuple):
        return np.stack([_array(each) for each in value])
    return np.asarray(value, np.float32)


def spectrograms(sounds: torch.Tensor) -> torch.Tensor:
    """Return the spectrograms of sounds.

    Args:
        sounds: (count, samples) or (count, channels, samples), full scale 1.

    Returns:
        (count, 1, channels * frequencies, times) in [0, 1]: 1 is a sine of full scale, 0 is 80 dB
        below.

    Example:
        >>> tone = torch.sin(torch.arange(4096) * (2 * torch.pi * 64 / 1024))
        >>> image = spectrograms(tone[None])
        >>> image.shape, image[0, 0, :, 8].argmax().item(), round(image.max().item(), 2)
        (torch.Size([1, 1, 513, 17]), 64, 1.0)
    """
    sounds = sounds.float()
    flat = sounds.reshape(-1, sounds.shape[-1])
    window = min(WINDOW, 2 ** max(2, int(np.log2(flat.shape[-1] / 2))))
    weights = torch.hann_window(window)
    found = torch.stft(flat, window, window // 4, window=weights, return_complex=True)
    decibels = 20 * torch.log10(found.abs() * (2 / weights.sum()) + 1e-12)
    images = (decibels / RANGE + 1).clamp(0, 1)
    return images.reshape(len(sounds), 1, -1, images.shape[-1])
