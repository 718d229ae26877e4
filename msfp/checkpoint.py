"""Packed checkpoints: a diffusers pipeline folder whose denoiser is codes, scales and JSON.

    folder/
      model_index.json        the pipeline's class and components, as diffusers writes it
      scheduler/ ...          every other component, as diffusers writes it
      unet/config.json        the architecture, as diffusers writes it
      unet/msfp.json          format version, and each quantized layer's formats
      unet/msfp.safetensors   packed codes, scales, zero points, the router, all other tensors

The codes of a layer are packed with `fpformats.packing`, all entries of its hub in one array.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fpformats import FloatFormat, decode_scaled, encode_scaled, pack, parse, unpack
from msfp.denoiser import COMPONENTS, denoiser_name, quantizable_layers, replace_layer
from msfp.errors import InputError
from msfp.layers import QuantizedLayer, add_router, quantized_class, quantized_layers
from msfp.quantizer import Quantizer
from msfp.summary import LayerSummary
from msfp.talora import Router
from msfp.version import __version__

FORMAT_VERSION = 1
CONFIG_FILE, TENSOR_FILE = "msfp.json", "msfp.safetensors"


def check_output(path: Path) -> None:
    """Raise InputError unless a new folder or file can be made at a path.

    It must be absent or an empty folder other than the working directory, and its nearest
    existing parent a folder that can be written to.
    """
    path = path.absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"output {path} exists: name a new one")
    if path.is_dir() and (any(path.iterdir()) or path == Path.cwd()):
        raise InputError(
            f"output folder {path} exists and is not empty or is the working directory: "
            "name a new one"
        )
    parent = next(parent for parent in path.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output {path} cannot be made: {parent} is not a folder to write in")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the given name once the block ends without an error."""
    check_output(folder)
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    except OSError as error:
        raise InputError(f"output {folder} cannot be made: {error.strerror}") from error
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _layer_tensors(name: str, layer: QuantizedLayer) -> dict[str, torch.Tensor]:
    """Return what a sealed layer stores."""
    if layer.entries is None:
        raise InputError(f"layer {name} is open: seal the denoiser before it is saved")
    quantizer, inputs = layer.weight_quantizer, layer.input_quantizer
    codes = encode_scaled(layer.entries, quantizer.format, quantizer.scale)
    tensors = {
        f"{name}.codes": pack(codes, quantizer.format.bits),
        f"{name}.weight_scale": quantizer.scale.detach(),
        f"{name}.input_scale": inputs.scale.detach(),
    }
    if inputs.zero_point is not None:
        tensors[f"{name}.input_zero_point"] = inputs.zero_point.detach()
    if layer.bias is not None:
        tensors[f"{name}.bias"] = layer.bias.detach()
    return tensors


def packed_tensors(denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor that a checkpoint of a denoiser holds, by its key in the file."""
    layers = quantized_layers(denoiser)
    prefixes = tuple(f"{name}." for name in layers)
    tensors = {
        key: tensor.contiguous()
        for key, tensor in denoiser.state_dict().items()
        if not key.startswith(prefixes)
    }
    for name, layer in layers.items():
        tensors |= _layer_tensors(name, layer)
    return tensors


def packed_size(denoiser: nn.Module) -> int:
    """Return the size of a denoiser's tensors as saved, in bytes."""
    return sum(tensor.nbytes for tensor in packed_tensors(denoiser).values())


def checksum(description: dict[str, Any], tensor_file: Path) -> str:
    """Return the SHA-256 of a description, without its own checksum, and of the tensor file."""
    plain = {key: value for key, value in description.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    digest.update(tensor_file.read_bytes())
    return digest.hexdigest()


def _describe(denoiser: nn.Module) -> dict[str, Any]:
    """Return the JSON description of a quantized denoiser, without the checksum."""
    layers = {}
    for name, layer in quantized_layers(denoiser).items():
        layers[name] = {
            "weight_format": str(layer.weight_quantizer.format),
            "input_format": str(layer.input_quantizer.format),
            "entries": 0 if layer.entries is None else len(layer.entries),
            "summary": layer.summary.to_dict(),
        }
    return {
        "format_version": FORMAT_VERSION,
        "msfp_version": __version__,
        "routed": hasattr(denoiser, "router"),
        "layers": layers,
    }


def save(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """Write a pipeline with a sealed quantized denoiser as a packed checkpoint, atomically.

    Args:
        pipe: The pipeline; its denoiser is quantized and sealed.
        folder: A new or an empty folder.

    Raises:
        InputError: If the folder exists and is not empty, or the denoiser is not sealed or not
            in float32. Nothing is written then.
    """
    name = denoiser_name(pipe)
    denoiser = getattr(pipe, name)
    if not quantized_layers(denoiser):
        raise InputError("denoiser has no quantized layers: call msfp.quantize first")
    tensors = packed_tensors(denoiser)
    narrow = {t.dtype for t in tensors.values() if t.is_floating_point()} - {torch.float32}
    if narrow:
        raise InputError(f"denoiser must be float32 to be saved, it has {narrow.pop()}")
    with atomic_folder(Path(folder)) as partial:
        pipe.save_config(partial)
        for other, component in pipe.components.items():
            if other != name and hasattr(component, "save_pretrained"):
                component.save_pretrained(partial / other)
        denoiser.save_config(partial / name)
        save_file(tensors, partial / name / TENSOR_FILE)
        description = _describe(denoiser)
        description["checksum"] = checksum(description, partial / name / TENSOR_FILE)
        (partial / name / CONFIG_FILE).write_text(json.dumps(description, indent=1) + "\n")


def _read(folder: Path) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    """Return the denoiser's component name, its description and its tensors."""
    for name in COMPONENTS:
        if (folder / name / CONFIG_FILE).is_file():
            break
    else:
        raise InputError(f"{folder} is not a checkpoint: it has no unet/{CONFIG_FILE}")
    tensor_file = folder / name / TENSOR_FILE
    try:
        description = json.loads((folder / name / CONFIG_FILE).read_text())
        version = description.get("format_version") if isinstance(description, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"checkpoint {folder} has format version {version}, this msfp reads "
                f"{FORMAT_VERSION}"
            )
        if description.get("checksum") != checksum(description, tensor_file):
            raise ValueError(f"{CONFIG_FILE} and {TENSOR_FILE} do not match their checksum")
        tensors = load_file(tensor_file)
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise corrupt(folder, error) from error
    return name, description, tensors


def corrupt(folder: Path, error: Exception) -> InputError:
    """Return the error of a damaged checkpoint, one sentence long."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(f"checkpoint {folder} is corrupt: {first_line}")


def _input_quantizer(name: str, fmt: FloatFormat, tensors: dict[str, torch.Tensor]) -> Quantizer:
    """Return a layer's input quantizer; uses up its tensors."""
    scale = tensors.pop(f"{name}.input_scale")
    zero = None if fmt.signed else tensors.pop(f"{name}.input_zero_point")
    for tensor in (scale, scale if zero is None else zero):
        if tensor.dtype != torch.float32 or tensor.dim() > 0 or not tensor.isfinite():
            raise ValueError(f"{name}: input scale and zero point must be finite float32 scalars")
    return Quantizer(fmt, scale, zero)


def _sealed_layer(
    plain: nn.Conv2d | nn.Linear, name: str, entry: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> QuantizedLayer:
    """Return the sealed quantized layer that a checkpoint describes; uses up its tensors."""
    summary = LayerSummary(**entry["summary"])
    fmt = parse(entry["weight_format"])
    scale = tensors.pop(f"{name}.weight_scale")
    shape = (int(entry["entries"]), *plain.weight.shape)
    if scale.numel() != shape[1]:
        raise ValueError(f"{name}.weight_scale must hold {shape[1]} numbers, not {scale.numel()}")
    codes = unpack(tensors.pop(f"{name}.codes"), fmt.bits, shape)
    inputs = _input_quantizer(name, parse(entry["input_format"]), tensors)
    if plain.bias is not None:
        bias = tensors.pop(f"{name}.bias")
        if bias.shape != plain.bias.shape or bias.dtype != torch.float32:
            raise ValueError(f"{name}.bias must be float32 of shape {tuple(plain.bias.shape)}")
        plain.bias.data = bias
    layer = quantized_class(plain).wrap(plain, Quantizer(fmt, scale), inputs, summary)
    layer.seal(decode_scaled(codes, fmt, scale))
    return layer


def _rebuild(denoiser: nn.Module, description: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Swap the layers of a plain denoiser for those of a checkpoint and load the rest."""
    plain = quantizable_layers(denoiser)
    for name, entry in description["layers"].items():
        replace_layer(denoiser, name, _sealed_layer(plain[name], name, entry, tensors))
    layers = quantized_layers(denoiser)
    counts = {int(entry["entries"]) for entry in description["layers"].values()}
    entries = counts.pop()
    if counts or entries < 1 or (entries > 1 and not description["routed"]):
        raise ValueError("every layer must have as many entries, and a router if more than one")
    if description["routed"]:
        add_router(denoiser, Router(len(layers), entries))
    held = tuple(f"{name}." for name in layers)
    expected = {key for key in denoiser.state_dict() if not key.startswith(held)}
    if expected != set(tensors):
        raise ValueError(f"tensors missing or left over: {sorted(expected ^ set(tensors))[:3]}")
    denoiser.load_state_dict(tensors, strict=False)


def load(folder: str | Path) -> DiffusionPipeline:
    """Read a packed checkpoint; needs no data and no forward pass.

    Args:
        folder: A folder written by `save`.

    Returns:
        The pipeline, whose samples are bit-equal to those of the saved one.

    Raises:
        InputError: If the folder is not a checkpoint, is of another version or is corrupt.
    """
    folder = Path(folder)
    name, description, tensors = _read(folder)
    try:
        library, class_name = json.loads((folder / "model_index.json").read_text())[name]
        if library != "diffusers":
            raise ValueError(f"the denoiser must be a class of diffusers, not of {library}")
        denoiser_class = getattr(diffusers, class_name)
        denoiser = denoiser_class.from_config(denoiser_class.load_config(folder / name))
        _rebuild(denoiser, description, tensors)
        return DiffusionPipeline.from_pretrained(
            folder, low_cpu_mem_usage=False, **{name: denoiser.eval()}
        )
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise corrupt(folder, error) from error
