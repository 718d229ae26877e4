"""A small image classifier whose penultimate features measure distances between sets of images."""

from __future__ import annotations

import torch
from torch import nn


class ImageClassifier(nn.Module):
    """Three convolutions and two linear layers on small square images.

    `features` returns the 64 penultimate activations. The Frechet distance is computed on them, as
    on Inception features for natural images (Heusel et al., NeurIPS 2017). They are bounded, so
    that no single outlier image dominates the distance.

    Args:
        channels: Colour channels of an image.
        image_size: Height and width, a multiple of 4.
        classes: Number of classes.
    """

    num_features = 64

    def __init__(self, channels: int, image_size: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * (image_size // 4) ** 2, self.num_features),
            nn.Tanh(),
        )
        self.head = nn.Linear(self.num_features, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return penultimate features of shape (n, 64) of images (n, channels, h, w) in [-1, 1]."""
        features: torch.Tensor = self.body(images)
        return features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return class logits of shape (n, classes)."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits
