"""Features of images, with which the Frechet distance compares image sets."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from msfp.errors import InputError

Features = Callable[[torch.Tensor], torch.Tensor]
"""Maps images (n, channels, height, width) in [0, 1] to features (n, any)."""
FEATURE_BATCH = 64
"""Images in one forward pass of a feature network."""
PIXELS = 8
"""Rows and columns of the averaged image, for the features "pixels" alone."""

NAMED = {
    "digits": "msfp.experiments.reference.features:digit_features",
    "photographs": "msfp.experiments.reference.features:photograph_features",
}
"""Features included with the reference models, by their short names."""


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Return the mean colours of 8x8 patches, shape (n, channels * 64): coarse, but built in.

    Example:
        >>> pixels(torch.ones(2, 3, 32, 32)).shape
        torch.Size([2, 192])
    """
    return F.adaptive_avg_pool2d(images, PIXELS).flatten(1)


def feature_network(name: str, device: str = "cpu") -> Features:
    """Return the features with a given name.

    Args:
        name: One of: "pixels"; "digits" or "photographs", the classifiers included with the
            reference models ("digits" reads the mean of the channels); the file of a TorchScript
            module; `module:function` of a Python module that can be imported from the working
            directory. The last two receive images in [0, 1] and must return (n, features).
        device: Device of a TorchScript module. All features take and return host memory.

    Raises:
        InputError: If there are no such features.
    """
    if name == "pixels":
        return pixels
    module, colon, attribute = NAMED.get(name, name).partition(":")
    if colon:
        return _imported(name, module, attribute)
    if not Path(name).is_file():
        raise InputError(
            f"features must be pixels, {', '.join(NAMED)}, a TorchScript file or "
            f"module:function, not {name!r}"
        )
    try:
        network = torch.jit.load(name, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"features {name} is not a TorchScript file") from error
    return lambda images: network(images.to(device)).cpu()


def _imported(name: str, module: str, attribute: str) -> Features:
    """Import a function from a module, which may be in the working directory."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function: Features = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"features {name} cannot be imported: {error}") from error
    if not callable(function):
        raise InputError(f"features {name} must be a function, not a {type(function).__name__}")
    return function


@torch.no_grad()
def checked_features(features: Features, images: torch.Tensor) -> torch.Tensor:
    """Return the features of images, shape (images, any).

    Raises:
        InputError: If the network does not accept such images, or returns another shape.
    """
    try:
        given = torch.cat([features(some) for some in images.split(FEATURE_BATCH)])
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1]
        raise InputError(
            f"features cannot be computed of images of shape {tuple(images.shape)}: {line}"
        ) from error
    if given.dim() != 2 or len(given) != len(images):
        raise InputError(
            f"features must have shape (images, any), not {tuple(given.shape)} for "
            f"{len(images)} images"
        )
    return given
