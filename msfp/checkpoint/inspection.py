"""Reading facts about a checkpoint or a denoiser, without reading its weights.

Formats come from the quantization config, scales and zero points from the tensors, and results of
the search from the summaries saved with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from fpformats import parse
from fpformats.ops.block_scaling import scale_values
from msfp.checkpoint.diffusers_config import MSFPConfig
from msfp.checkpoint.facts import LayerFacts, ProductFacts
from msfp.checkpoint.integrity import as_stored
from msfp.checkpoint.io import CONFIG_FILE, quantized_components
from msfp.errors import InputError
from msfp.layers.attention import OPERANDS
from msfp.layers.base import quantized_networks
from msfp.layers.execution.grids import integer_grids, whole_steps
from msfp.layers.formats import BlockFormats, LayerFormats
from msfp.layers.selection import refuse_additions
from msfp.layers.trainable import trainable_layers
from msfp.pipelines.denoiser import denoisers_of, named
from msfp.search.coverage import Coverage, together

BYTES = {"U8": 1, "I8": 1, "I32": 4, "I64": 8, "F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number, by the name of its dtype in safetensors."""
SCALE_BYTES = 4


class _Stored(NamedTuple):
    """A config, the sizes of its tensors in bytes, and a function that reads a tensor."""

    config: MSFPConfig
    sizes: Mapping[str, int]
    read: Callable[[str], torch.Tensor]


def inspect_layers(model: DiffusionPipeline | nn.Module | str | Path) -> list[LayerFacts]:
    """Return the facts of each quantized layer, in definition order.

    A folder without summaries does not store that order. Its layers are in alphabetical order.

    Args:
        model: A pipeline with packed denoisers, a packed denoiser, or the folder of either. In a
            folder only scales and zero points are read. If several are quantized, the names of
            layers begin with that of their component.

    Raises:
        InputError: If nothing there is quantized by msfp, a layer is trainable, or a file cannot be
            read.

    Example:
        >>> import msfp
        >>> network = nn.Sequential(nn.Linear(8, 16))
        >>> config = msfp.QuantizationConfig(activation_bits=None, end_bits=4)
        >>> _ = msfp.quantize(network, config)
        >>> _ = msfp.pack(network)
        >>> facts = inspect_layers(network)[0]
        >>> facts.layer, facts.weight.bits, facts.bytes == 16 * 8 // 2 + 16 * 4 + 16 * 4
        ('0', 4, True)
    """
    stored = _stored(model)
    return [
        replace(facts, layer=named(component, facts.layer, stored))
        for component, each in stored.items()
        for facts in _facts(*each)
    ]


def inspect_products(model: DiffusionPipeline | nn.Module | str | Path) -> list[ProductFacts]:
    """Return the facts of each operand of quantized attention products; may be empty.

    Args:
        model: As for `inspect_layers`.

    Raises:
        InputError: As `inspect_layers` does.
    """
    stored = _stored(model)
    return [
        replace(facts, layer=named(component, facts.layer, stored))
        for component, each in stored.items()
        for facts in _product_facts(*each)
    ]


def inspect_coverage(model: DiffusionPipeline | nn.Module | str | Path) -> Coverage | None:
    """Return which share of the denoisers is quantized, and what is not; None if unknown.

    Files of version 0.2.0 do not have it.

    Args:
        model: As for `inspect_layers`; layers may be trainable.

    Raises:
        InputError: If nothing there is quantized by msfp, or a file cannot be read.

    Example:
        >>> import msfp
        >>> network = nn.Sequential(nn.Linear(8, 16))
        >>> config = msfp.QuantizationConfig(activation_bits=None, end_bits=4)
        >>> _ = msfp.quantize(network, config)
        >>> inspect_coverage(network).sentences()[0]
        '4 bits: 89% of parameters.'
    """
    parts = []
    for component, config in _configs(model).items():
        coverage = config.covered()
        if coverage is None:
            return None
        parts.append((component, coverage))
    return together(parts)


def _product_facts(
    config: MSFPConfig, sizes: Mapping[str, int], read: Callable[[str], torch.Tensor]
) -> Iterator[ProductFacts]:
    """Yield the facts of each operand of a config, given the sizes and a reader of tensors."""
    for module, formats in config.products.items():
        for operand in OPERANDS:
            name, fmt = f"{module}.products.{operand}", parse(formats[operand])
            scale = read(f"{name}.scale").item()
            shifted = f"{name}.zero_point" in sizes
            zero = read(f"{name}.zero_point").item() if shifted else None
            ends = (float(fmt.min), float(fmt.max))
            low, high = (scale * end + (zero or 0.0) for end in ends)
            size = sum(sizes.get(f"{name}.{leaf}", 0) for leaf in ("scale", "zero_point"))
            yield ProductFacts(name, fmt, scale, zero, (low, high), size)


def _stored(model: DiffusionPipeline | nn.Module | str | Path) -> dict[str, _Stored]:
    """Return the config and tensors of each quantized network of a folder or a pipeline."""
    if isinstance(model, str | Path):
        return {name: _of_folder(folder) for name, folder in network_folders(Path(model)).items()}
    networks = quantized_networks(model)
    for network in networks.values():
        for name in trainable_layers(network):
            raise InputError(f"layer {name} is trainable: call msfp.pack first")
    stored = {}
    for component, config in _configs(model).items():
        tensors = as_stored(networks[component].state_dict())
        refuse_additions(tensors)
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        stored[component] = _Stored(config, sizes, tensors.__getitem__)
    return stored


def _configs(model: DiffusionPipeline | nn.Module | str | Path) -> dict[str, MSFPConfig]:
    """Return the config of each quantized network of a folder or a pipeline."""
    if isinstance(model, str | Path):
        return {name: read_config(folder) for name, folder in network_folders(Path(model)).items()}
    configs = {}
    for component, network in quantized_networks(model).items() or denoisers_of(model).items():
        config = getattr(getattr(network, "hf_quantizer", None), "quantization_config", None)
        if not isinstance(config, MSFPConfig):
            raise InputError(f"{type(network).__name__} is not quantized: call msfp.quantize first")
        configs[component] = config
    return configs


def network_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of quantized networks, given that of a pipeline or a network, by name.

    Raises:
        InputError: If nothing there is quantized by msfp.
    """
    if not folder.is_dir():
        raise InputError(f"checkpoint {folder} is not a folder")
    if (folder / CONFIG_FILE).is_file():
        return {"": folder}
    names = quantized_components(folder)
    if not names:
        raise InputError(f"checkpoint {folder} has no component that is quantized by msfp")
    return {name: folder / name for name in names}


def read_config(folder: Path) -> MSFPConfig:
    """Return the config of a network's folder.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        description = json.loads((folder / CONFIG_FILE).read_text())["quantization_config"]
        return MSFPConfig.from_dict(description)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder / CONFIG_FILE} is not a config of msfp: {error}") from error


def _of_folder(folder: Path) -> _Stored:
    """Return the config of a network's folder, the sizes of its tensors, and a reader of them."""
    config = read_config(folder)
    places: dict[str, Path] = {}
    sizes: dict[str, int] = {}

    def read(name: str) -> torch.Tensor:
        with _reading(folder), safe_open(places[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor

    for file in sorted(folder.glob("*.safetensors")):
        with _reading(folder), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                stored = opened.get_slice(name)
                sizes[name] = math.prod(stored.get_shape()) * BYTES[stored.get_dtype()]
                places[name] = file
    return _Stored(config, sizes, read)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Raise InputError with the reason if a folder cannot be read inside the `with` block."""
    try:
        yield
    except (SafetensorError, OSError, LookupError) as error:
        raise InputError(f"checkpoint {folder} cannot be read: {error}") from error


def _facts(
    config: MSFPConfig, sizes: Mapping[str, int], read: Callable[[str], torch.Tensor]
) -> list[LayerFacts]:
    """Return the facts of each layer of a config, given the sizes and a reader of tensors."""
    summaries = {summary.name: summary for summary in config.summaries}
    owned: dict[str, int] = dict.fromkeys(config.layers, 0)
    for name, size in sizes.items():
        layer = name.rpartition(".")[0]
        if layer in owned:
            owned[layer] += size

    def numbers(name: str) -> torch.Tensor:
        return read(name).view(torch.float32)

    def facts(layer: str, formats: LayerFormats | BlockFormats) -> LayerFacts:
        scale, zero, low, high = math.nan, None, math.nan, math.nan
        if isinstance(formats, LayerFormats) and formats.input is not None:
            # The scales of channels differ if an input is split.
            scale = numbers(f"{layer}.input_scale").max().item()
            if not formats.input.signed:
                zero = numbers(f"{layer}.input_zero_point").item()
            ends = (float(formats.input.min), float(formats.input.max))
            low, high = (scale * end + (zero or 0.0) for end in ends)
        clip = (
            _largest_in_blocks(layer, formats, read)
            if isinstance(formats, BlockFormats)
            else numbers(f"{layer}.weight_scale").max().item() * float(formats.weight.max)
        )
        summary = summaries.get(layer)
        ends = (low, high)
        why = _float_reason(layer, formats, sizes, config.adapters, read)
        return LayerFacts(layer, formats, clip, scale, ends, zero, owned[layer], summary, why)

    # JSON files store layers in alphabetical order, but summaries in the order of the denoiser.
    known = {name: config.layers[name] for name in summaries if name in config.layers}
    return [facts(layer, formats) for layer, formats in (known | config.layers).items()]


def _float_reason(
    layer: str,
    formats: LayerFormats | BlockFormats,
    sizes: Mapping[str, int],
    adapters: int,
    read: Callable[[str], torch.Tensor],
) -> str | None:
    """Return why a layer is computed in floating point, or None if it has integer grids."""
    if isinstance(formats, BlockFormats):
        return "block formats have a scale for each block"
    scale = zero = None
    if formats.input is not None:
        scale = read(f"{layer}.input_scale").view(torch.float32)
        if not formats.input.signed:
            zero = read(f"{layer}.input_zero_point").view(torch.float32)
    whole = formats.input is None or scale is None or zero is None
    if formats.input is not None and scale is not None and zero is not None:
        whole = whole_steps(formats.input, scale, zero) is not None
    rows = sizes[f"{layer}.weight_scale"] // SCALE_BYTES
    numbers = sizes[f"{layer}.codes"] * 8 // formats.bits
    terms = numbers // rows if formats.branch_adapters > 1 else numbers // rows // adapters
    channels = scale.numel() if scale is not None and scale.dim() else terms
    found = integer_grids(
        formats.weight, formats.input, scale, whole=whole, terms=terms, channels=channels
    )
    return found if isinstance(found, str) else None


def _largest_in_blocks(
    layer: str, formats: BlockFormats, read: Callable[[str], torch.Tensor]
) -> float:
    """Return the largest weight that can be represented in any block of a layer."""
    fmt = formats.weight_blocks
    scales, chosen = scale_values(read(f"{layer}.weight_scale"), fmt, "float32")
    if fmt.tensor_scale:
        scales = scales * read(f"{layer}.tensor_scale").view(torch.float32)
    largest = torch.full_like(scales, fmt.element.max)
    if chosen is not None:
        largest[chosen] = fmt.choices[1].element.max
    return float((scales * largest).max())
