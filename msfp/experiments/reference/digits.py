"""The data of the reference model: scikit-learn's bundled handwritten digits at 16x16 pixels."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

IMAGE_SIZE = 16


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 1797 digits as images in [-1, 1] and their labels.

    The 8x8 images with 17 grey levels (UCI "Optical Recognition of Handwritten Digits" test set)
    are enlarged to 16x16 by bilinear interpolation.

    Returns:
        Images of shape (1797, 1, 16, 16), float32, and labels of shape (1797,), int64.

    Example:
        >>> images, labels = digits()
        >>> images.shape, images.min().item(), images.max().item()
        (torch.Size([1797, 1, 16, 16]), -1.0, 1.0)
    """
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    return images, torch.tensor(data.target, dtype=torch.int64)
