"""The option `--call`: arguments of a pipeline's call as JSON, with files read by their type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msfp.errors import InputError


def call_from(text: str | None) -> dict[str, Any]:
    """Return the arguments of a call.

    Args:
        text: A JSON object, or None for no arguments. A string that ends in a suffix of `READERS`
            names a file; the argument is its contents. Lists of such strings are lists of these.

    Raises:
        InputError: If the text is not a JSON object, or a file cannot be read.

    Example:
        >>> call_from('{"strength": 0.5, "height": 64}')
        {'strength': 0.5, 'height': 64}
    """
    if text is None:
        return {}
    try:
        given = json.loads(text)
    except ValueError as error:
        raise InputError(f"call must be JSON, such as '{{\"strength\": 0.5}}': {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"call must be a JSON object of arguments, not {text}")
    return {name: _read(name, value) for name, value in given.items()}


def _read(name: str, value: Any) -> Any:
    """Return a value with the files that it names read."""
    if isinstance(value, list):
        return [_read(name, each) for each in value]
    if isinstance(value, dict):
        return {key: _read(f"{name}.{key}", each) for key, each in value.items()}
    reader = READERS.get(Path(value).suffix.lower()) if isinstance(value, str) else None
    if reader is None:
        return value
    try:
        return reader(Path(value))
    except Exception as error:  # readers of other packages raise anything
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"call has {name}={value!r}, which cannot be read: {line}") from error


def _image(file: Path) -> Any:
    from PIL import Image

    with Image.open(file) as opened:
        return opened.convert("RGB")


def _frames(file: Path) -> Any:
    from PIL import Image, ImageSequence

    with Image.open(file) as opened:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]


def _video(file: Path) -> Any:
    from diffusers.utils import load_video

    if not file.is_file():  # otherwise its name would be taken for an address
        raise FileNotFoundError(f"there is no file {file}")
    return load_video(str(file))


def _sound(file: Path) -> Any:
    import torch
    from scipy.io import wavfile

    _, samples = wavfile.read(file)
    sound = torch.from_numpy(samples.T.copy())
    whole = not sound.is_floating_point()
    return sound.float() / (torch.iinfo(sound.dtype).max if whole else 1)


def _array(file: Path) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.load(file, allow_pickle=False))


def _tensors(file: Path) -> Any:
    from safetensors.torch import load_file

    tensors = load_file(file)
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


READERS: dict[str, Callable[[Path], Any]] = {
    ".png": _image, ".jpg": _image, ".jpeg": _image, ".webp": _image, ".bmp": _image,
    ".gif": _frames, ".mp4": _video, ".mov": _video, ".webm": _video, ".avi": _video,
    ".wav": _sound, ".npy": _array, ".safetensors": _tensors,
}  # fmt: skip
"""Readers by suffix: an image, a list of images, samples (channels, samples), or tensors."""
