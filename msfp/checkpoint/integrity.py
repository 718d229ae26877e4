"""How a checkpoint stores tensors, and checks that they are unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fpformats.ops.block_scaling import scale_values
from msfp.checkpoint.migrations import config_of_version_1
from msfp.errors import InputError
from msfp.layers.formats import BlockFormats, LayerFormats
from msfp.support.container import FileKind, Header, header_in, metadata

CHECKSUM = "checksum"
FIRST_VERSION, FIRST_CHECKSUM = "msfp_format_version", "msfp_checksum"
"""Metadata entries of files of version 1."""
KIND = FileKind("a quantized denoiser", migrations={1: config_of_version_1})
"""The kind of the safetensors files; the facts of `config.json` have the same versions."""
BRANCH = (".branch_down", ".branch_up")
"""Ends of the names of a low-rank branch's factors."""
DTYPES = {
    "codes": torch.uint8,
    "weight_scale": torch.int32,
    "input_scale": torch.int32,
    "input_zero_point": torch.int32,
    "branch_input_scale": torch.int32,
    "branch_input_zero_point": torch.int32,
    "tensor_scale": torch.int32,
}
"""The tensors of a quantized layer; int32 tensors hold the bits of float32 numbers."""


def checksum(tensors: Mapping[str, torch.Tensor], description: dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON-able description and of tensors in the order of their names.

    The checksum covers the name, dtype, shape and bytes of each tensor.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # A single number may have a stride of 0, which a view as bytes refuses. A copy avoids this.
        whole = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        data = whole.view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def describe(tensors: Mapping[str, torch.Tensor], description: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    return metadata(KIND, Header({}, {CHECKSUM: checksum(tensors, description)}))


def verify(
    files: Sequence[str | Path],
    description: dict[str, Any],
    formats: Mapping[str, LayerFormats | BlockFormats],
    products: Iterable[str],
) -> None:
    """Check that files hold the tensors that were saved with a description.

    Args:
        files: All safetensors files of one denoiser.
        description: Its quantization config, as in `config.json`.
        formats: The formats of its layers.
        products: The names of its attention modules with quantized products.

    Raises:
        InputError: If a file is incomplete, of a later version or not of msfp, the tensors or the
            description have been changed, or a tensor of a layer has the wrong dtype or holds an
            impossible scale or zero point.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise InputError(f"{file.name} is not a safetensors file; msfp reads no other kind")
        try:
            with safe_open(file, framework="pt") as opened:
                given = _checksum_in(file.name, opened.metadata() or {})
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file.name} is not a whole safetensors file: {error}") from error
    if given != checksum(tensors, description):
        names = " and ".join(Path(file).name for file in files)
        raise InputError(f"{names} and config.json do not match their checksum")
    for name, each in formats.items():
        _check_layer(name, each, tensors)
    for name in products:
        for key in (key for key in tensors if key.startswith(f"{name}.products.")):
            _check_numbers(key, tensors[key].float(), positive=key.endswith(".scale"))


def _checksum_in(file: str, told: Mapping[str, str]) -> str:
    """Return the checksum in the metadata of a file.

    Raises:
        InputError: If the file is not of a quantized denoiser, or of a later version.
    """
    if told.get(FIRST_VERSION) == "1":
        return told.get(FIRST_CHECKSUM, "")
    _, header = header_in(file, told, KIND)
    return str(header.facts.get(CHECKSUM))


def as_stored(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a denoiser's tensors, with low-rank branches in float16 where that is exact.

    Example:
        >>> factor = torch.tensor([0.1]).half().float()
        >>> [each.dtype for each in as_stored({"a.branch_up": factor, "a.bias": factor}).values()]
        [torch.float16, torch.float32]
    """
    return {
        name: tensor.half() if name.endswith(BRANCH) and _is_half(tensor) else tensor
        for name, tensor in tensors.items()
    }


def _is_half(tensor: torch.Tensor) -> bool:
    """Return whether float16 represents all numbers of a float32 tensor exactly."""
    return tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor)


def check_names(expected: set[str], given: set[str]) -> None:
    """Raise InputError unless a checkpoint has exactly the tensors that its config needs."""
    if expected - given:
        raise InputError(f"tensors are missing: {sorted(expected - given)[:3]}")
    if given - expected:
        raise InputError(f"unexpected tensors: {sorted(given - expected)[:3]}")


def _check_layer(
    name: str, formats: LayerFormats | BlockFormats, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Check the dtypes of a layer's tensors, and the values of scales and zero points."""
    in_blocks = isinstance(formats, BlockFormats)
    for leaf, dtype in (DTYPES | ({"weight_scale": torch.uint8} if in_blocks else {})).items():
        key = f"{name}.{leaf}"
        if key not in tensors:
            continue
        if tensors[key].dtype != dtype:
            raise InputError(f"{key} must be {dtype}, not {tensors[key].dtype}")
        if dtype == torch.int32:
            numbers = tensors[key].view(torch.float32)
            _check_numbers(key, numbers, positive="zero_point" not in leaf)
        elif leaf == "weight_scale" and isinstance(formats, BlockFormats):
            # The scale of a block may be zero if other blocks have much larger numbers.
            scales, _ = scale_values(tensors[key], formats.weight_blocks, "float32")
            if not (scales.isfinite() & (scales >= 0)).all():
                raise InputError(f"{key} must hold codes of finite, non-negative numbers")


def _check_numbers(key: str, numbers: torch.Tensor, *, positive: bool) -> None:
    """Raise InputError unless numbers are finite, and positive if they must be."""
    if not numbers.isfinite().all() or (positive and (numbers <= 0).any()):
        kind = "positive and finite" if positive else "finite"
        raise InputError(f"{key} must be {kind} float32 numbers")
