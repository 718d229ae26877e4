"""Features of digits and of photographs for the Frechet distances of the reference models."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file

from msfp.experiments.reference.classifier import ImageClassifier
from msfp.experiments.reference.pipelines import FOLDER

CLASSIFIER_FILE = FOLDER / "classifier.safetensors"
PHOTOGRAPH_CLASSIFIER_FILE = FOLDER / "photograph-classifier.safetensors"


@functools.cache
def digit_classifier() -> ImageClassifier:
    """Return the classifier of digits, whose features serve for Frechet distances of digits."""
    return _trained(ImageClassifier(channels=1, image_size=16, classes=10), CLASSIFIER_FILE)


@functools.cache
def photograph_classifier() -> ImageClassifier:
    """Return the classifier of crops by photograph, for Frechet distances of photographs."""
    classifier = ImageClassifier(channels=3, image_size=32, classes=6)
    return _trained(classifier, PHOTOGRAPH_CLASSIFIER_FILE)


def _trained(classifier: ImageClassifier, file: Path) -> ImageClassifier:
    classifier.load_state_dict(load_file(file))
    return classifier.eval()


def digit_features(images: torch.Tensor) -> torch.Tensor:
    """Return the classifier's features of images in [0, 1], shape (n, 64).

    The classifier takes grey images; a colour image is replaced by the mean of its channels.
    """
    return digit_classifier().features(images.mean(dim=1, keepdim=True) * 2 - 1)


def photograph_features(images: torch.Tensor) -> torch.Tensor:
    """Return the classifier's features of colour images in [0, 1], shape (n, 64)."""
    return photograph_classifier().features(images * 2 - 1)
