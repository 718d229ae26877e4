"""Telling whether the tensors of a checkpoint are those that were saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fpformats import decode
from msfp.errors import InputError
from msfp.layers.formats import BlockFormats, LayerFormats, read_formats

FORMAT_VERSION = 1
VERSION_KEY, CHECKSUM_KEY = "msfp_format_version", "msfp_checksum"
"""Keys in the metadata of a safetensors file."""
DTYPES = {
    "codes": torch.uint8,
    "weight_scale": torch.int32,
    "input_scale": torch.int32,
    "input_zero_point": torch.int32,
    "tensor_scale": torch.int32,
}
"""The tensors of a quantized layer; those of int32 are the bits of float32 numbers."""


def checksum(tensors: Mapping[str, torch.Tensor], description: dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON-able description and of tensors in the order of their names.

    Of each tensor its name, dtype, shape and bytes count.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # A single number may have a stride of 0, which a view as bytes refuses; a copy has not.
        whole = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        data = whole.view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def metadata(tensors: Mapping[str, torch.Tensor], description: dict[str, Any]) -> dict[str, str]:
    """Return what a safetensors file says of itself."""
    return {
        VERSION_KEY: str(FORMAT_VERSION),
        CHECKSUM_KEY: checksum(tensors, description),
    }


def verify(files: Sequence[str | Path], description: dict[str, Any]) -> None:
    """Check that files hold what was saved along with a description.

    Args:
        files: All safetensors files of one denoiser.
        description: Its quantization config.

    Raises:
        InputError: If a file is not whole, of another format version or not of msfp, the tensors
            or the description have been changed, or a tensor of a layer is of another dtype or
            holds a scale or zero point that cannot be.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise InputError(f"{file.name} is not a safetensors file, and others are not read")
        try:
            with safe_open(file, framework="pt") as opened:
                says = opened.metadata() or {}
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file.name} is not a whole safetensors file: {error}") from error
        check_version(f"{file.name} has", says.get(VERSION_KEY))
        given = says.get(CHECKSUM_KEY)
    if given != checksum(tensors, description):
        names = " and ".join(Path(file).name for file in files)
        raise InputError(f"{names} and config.json do not match their checksum")
    for name, formats in description["layers"].items():
        _check_layer(name, read_formats(formats), tensors)
    for name in description["products"]:
        for key in (key for key in tensors if key.startswith(f"{name}.products.")):
            _check_numbers(key, tensors[key].float(), positive=key.endswith(".scale"))


def check_version(subject: str, version: Any) -> None:
    """Raise InputError unless a format version is the one that is read."""
    if str(version) != str(FORMAT_VERSION):
        raise InputError(f"{subject} format version {version}, this msfp reads {FORMAT_VERSION}")


def _check_layer(
    name: str, formats: LayerFormats | BlockFormats, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Check the dtypes of a layer's tensors, and the numbers that scales and zero points are."""
    in_blocks = isinstance(formats, BlockFormats)
    for leaf, dtype in (DTYPES | ({"weight_scale": torch.uint8} if in_blocks else {})).items():
        key = f"{name}.{leaf}"
        if key not in tensors:
            continue
        if tensors[key].dtype != dtype:
            raise InputError(f"{key} must be {dtype}, not {tensors[key].dtype}")
        if dtype == torch.int32:
            numbers = tensors[key].view(torch.float32)
            _check_numbers(key, numbers, positive=leaf != "input_zero_point")
        elif leaf == "weight_scale" and isinstance(formats, BlockFormats):
            # A block of numbers that are small beside others may have a scale of zero.
            scales = decode(tensors[key], formats.weight_blocks.scale)
            if not (scales.isfinite() & (scales >= 0)).all():
                raise InputError(f"{key} must be codes of finite numbers from 0 on")


def _check_numbers(key: str, numbers: torch.Tensor, *, positive: bool) -> None:
    """Raise InputError unless numbers are finite, and positive if they must be."""
    if not numbers.isfinite().all() or (positive and (numbers <= 0).any()):
        kind = "positive and finite" if positive else "finite"
        raise InputError(f"{key} must be {kind} float32 numbers")
