"""Folders of image files: read as tensors without aliasing, and written as 8-bit PNG."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from msfp.errors import InputError
from msfp.support.files import atomic_file

Resize = Literal["bicubic", "lanczos"]
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
READ_AT_ONCE = 64


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder and its subfolders, sorted by path.

    Raises:
        InputError: If the folder does not exist, or has fewer than two images.
    """
    if not folder.is_dir():
        raise InputError(f"images {folder} is not a folder")
    files = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES]
    if len(files) < 2:
        raise InputError(
            f"images {folder} must hold at least 2 files of {', '.join(SUFFIXES)}, not {len(files)}"
        )
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def listed(folder: Path) -> str:
    """Return the number of images in a folder, with a hash of their paths and sizes."""
    files = [
        (file.relative_to(folder).as_posix(), file.stat().st_size) for file in image_files(folder)
    ]
    digits = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    return f"{len(files)} images ({digits})"


def read_image(file: Path, size: int, resize: Resize = "bicubic") -> torch.Tensor:
    """Return the central square of an image as RGB, shape (3, size, size), float32 in [0, 1].

    Pillow resizes each channel in float32 with its antialiasing filter, without rounding to 8 bits
    (Parmar, Zhang and Zhu, CVPR 2022). A square of the right size is not resized.

    Raises:
        InputError: If the file cannot be read.
    """
    try:
        with Image.open(file) as opened:
            mode, image = opened.mode, opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {file} cannot be read: {error}") from error
    if mode[0] in "IF":  # Pillow would clip these modes at 255
        raise InputError(f"image {file} must have 8 bits for each colour; its mode is {mode}")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32)
    channels = [_resized(pixels[..., index], size, resize) for index in range(3)]
    return torch.from_numpy(np.stack(channels) / np.float32(255))


def _resized(channel: np.ndarray[Any, Any], size: int, resize: Resize) -> np.ndarray[Any, Any]:
    """Return one channel resized in float32, with overshoot clipped to the range 0 to 255."""
    if channel.shape == (size, size):
        return channel
    kind = Image.Resampling[resize.upper()]
    return np.asarray(Image.fromarray(channel).resize((size, size), kind)).clip(0, 255)


def read_batches(files: list[Path], size: int, resize: Resize) -> Iterator[torch.Tensor]:
    """Yield batches of images, shape (n, 3, size, size), in file order, read by several threads."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), READ_AT_ONCE):
            some = files[start : start + READ_AT_ONCE]
            yield torch.stack(list(pool.map(lambda file: read_image(file, size, resize), some)))


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    """Return images in [0, 1] rounded to the values of an 8-bit file.

    Example:
        >>> (eight_bits(torch.tensor([0.0, 0.5, 1.0])) * 255).tolist()
        [0.0, 128.0, 255.0]
    """
    return (images * 255).round() / 255


class PngFolder:
    """A folder to which images are written one by one, and from which a run can resume.

    Args:
        folder: A new folder, or that of a run with the same settings.
        settings: All settings that the images depend on; saved beside the folder as a .json file.

    Raises:
        InputError: If the folder has other contents, or cannot be made.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder = folder.absolute()
        note = folder.with_name(f"{folder.name}.json")
        if folder.exists() and (
            not folder.is_dir() or (not note.is_file() and any(folder.iterdir()))
        ):
            raise InputError(f"images {folder} must be a new folder, or a folder to resume")
        text = json.dumps(settings, indent=1) + "\n"
        if note.exists() and note.read_text(encoding="utf-8") != text:
            raise InputError(f"images {folder} holds images of other settings; see {note.name}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            note.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"images {folder} cannot be made: {error.strerror}") from error
        self.folder = folder

    def file(self, number: int) -> Path:
        """Return the path of an image, written or not."""
        return self.folder / f"{number:06}.png"

    def has(self, numbers: range) -> bool:
        """Return whether all images with these numbers are written."""
        return all(self.file(number).exists() for number in numbers)

    def write(self, images: torch.Tensor, first: int) -> None:
        """Write images (n, 1 or 3, height, width) in [0, 1], numbered from `first`."""
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for number, image in enumerate(pixels, start=first):
            with atomic_file(self.file(number)) as partial:
                Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(partial)
