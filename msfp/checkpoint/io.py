"""Packed checkpoints: folders in the layout of diffusers, with codes and scales as weights.

The `save_pretrained` method of a pipeline writes it. The quantization config is in the
`config.json` of its denoiser. A network that is not of diffusers is written to a folder with the
same two files that diffusers would write. docs/checkpoint-format.md describes the layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from msfp.checkpoint.diffusers_config import MSFPConfig, MSFPMethod
from msfp.checkpoint.diffusers_quantizer import attach
from msfp.checkpoint.integrity import as_stored, check_names, verify
from msfp.checkpoint.model_card import CardFacts, model_card
from msfp.checkpoint.placeholders import make_room
from msfp.errors import InputError
from msfp.layers.adapters import refuse_adapters
from msfp.layers.attention import make_room_for_products
from msfp.layers.base import quantized_networks, refuse_quantized
from msfp.layers.trainable import trainable_layers
from msfp.pipelines.class_conditional import pipeline_class
from msfp.pipelines.denoiser import networks_of
from msfp.pipelines.packages import HUB_NAME, is_of_diffusers, libraries, variant_of
from msfp.schedulers.samplers import restore_sampler
from msfp.support.checks import check_path, check_type
from msfp.support.container import sort_metadata
from msfp.support.files import atomic_folder
from msfp.support.offloading import with_weights

CONFIG_FILE, TENSOR_FILE = "config.json", "diffusion_pytorch_model.safetensors"
CARD_FILE = "README.md"


def packed_size(denoiser: nn.Module) -> int:
    """Return the size of a denoiser's tensors as saved, in bytes."""
    return sum(tensor.nbytes for tensor in as_stored(denoiser.state_dict()).values())


@with_weights(networks_of)
def save(model: DiffusionPipeline | nn.Module, folder: str | Path) -> None:
    """Write a pipeline with a packed denoiser, or a packed network, to a folder, atomically.

    Args:
        model: A pipeline with a quantized and packed denoiser, or a quantized and packed network.
        folder: A new or an empty folder. Its README.md says how it is loaded, what was quantized
            and how, and the measured error.

    Raises:
        InputError: If the folder exists and is not empty, the denoiser is not packed, or a LoRA is
            loaded. Nothing is written then.
    """
    networks = quantized_networks(model).values()
    if not networks:
        raise InputError("denoiser has no quantized layers: call msfp.quantize first")
    for network in networks:
        if trainable_layers(network):
            name = next(iter(trainable_layers(network)))
            raise InputError(f"layer {name} is trainable: call msfp.pack before it is saved")
    for name, part in getattr(model, "components", {}).items():
        if isinstance(part, PreTrainedModel):  # transformers would write its LoRAs alone
            refuse_adapters(name, part)
    folder = check_path("folder", folder)
    with atomic_folder(folder) as partial:
        if isinstance(model, DiffusionPipeline | ModelMixin):
            model.save_pretrained(partial)
        else:
            _save_network(model, partial)
        for file in partial.rglob("*.safetensors"):
            sort_metadata(file)
        (partial / CARD_FILE).write_text(_card(model, folder), encoding="utf-8")


def _card(model: DiffusionPipeline | nn.Module, folder: Path) -> str:
    """Return the model card of a folder."""
    facts = {}
    for name, network in quantized_networks(model).items():
        quantizer: Any = network.hf_quantizer
        config = quantizer.quantization_config
        facts[name] = CardFacts(
            type(network).__name__, config.request, config.layers, config.summaries,
            config.covered(), config.measured, packed_size(network),
        )  # fmt: skip
    kind = type(model).__name__
    loader = f'diffusers.{kind}.from_pretrained("{folder.name}")'
    if not isinstance(model, DiffusionPipeline | ModelMixin):
        loader = f'msfp.load("{folder.name}", into={kind}(...))'
    original = str(dict(getattr(model, "config", {})).get("_name_or_path", ""))
    on_hub = HUB_NAME.fullmatch(original) is not None and not Path(original).exists()
    return model_card(facts, loader, original if on_hub else None)


def _save_network(network: nn.Module, folder: Path) -> None:
    """Write the two files of a network that is not of diffusers."""
    quantizer: Any = network.hf_quantizer
    tensors, metadata = quantizer.get_state_dict_and_metadata(network.state_dict())
    description = {"quantization_config": quantizer.quantization_config.to_dict()}
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSOR_FILE, metadata)


def load(folder: str | Path, *, into: nn.Module | None = None) -> Any:
    """Read a packed checkpoint; needs no data and no forward pass.

    Args:
        folder: A folder written by `save`.
        into: A full-precision network of the same architecture, which is changed in place. Only
            for the folder of a network that is not of diffusers.

    Returns:
        The pipeline, whose samples are bit-equal to those of the saved one, or the network.

    Raises:
        InputError: If the folder does not exist, is not a checkpoint, is of another version or is
            corrupt, if it holds a network without a pipeline and `into` is not given, or if `into`
            is quantized already.
    """
    folder = check_path("folder", folder)
    if into is not None:
        check_type("into", into, nn.Module)
    if not folder.is_dir():
        raise InputError(f"checkpoint {folder} cannot be loaded: it is not a folder")
    try:
        return _load_pipeline(folder) if into is None else _load_network(folder, into)
    except (
        ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
        SafetensorError, TypeError, ValueError,
    ) as error:  # fmt: skip
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"checkpoint {folder} cannot be loaded: {first_line}") from error


def quantized_components(folder: Path) -> list[str]:
    """Return the names of the components in a pipeline's folder that msfp quantized."""
    return (
        sorted(each.name for each in folder.iterdir() if is_packed(each)) if folder.is_dir() else []
    )


def is_packed(folder: Path) -> bool:
    """Return whether the config in a network's folder has the quantization method msfp."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return False
    try:
        description = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    config = description.get("quantization_config") if isinstance(description, dict) else None
    return isinstance(config, dict) and config.get("quant_method") == MSFPMethod.MSFP.value


def _load_pipeline(folder: Path) -> DiffusionPipeline:
    """Load a pipeline through diffusers, without importing code that the folder names."""
    names = quantized_components(folder)
    if not names:
        raise InputError(_why_no_pipeline(folder))
    for name in names:
        library = libraries(folder)[name]
        if not is_of_diffusers(library):
            raise InputError(f"the {name} must be a class of diffusers, not of {library}")
    pipe = pipeline_class(folder).from_pretrained(
        folder, local_files_only=True, variant=variant_of(folder)
    )
    restore_sampler(pipe, folder)
    return pipe


def _why_no_pipeline(folder: Path) -> str:
    """Return why a folder does not hold a pipeline with a quantized denoiser."""
    if not is_packed(folder):
        return "it has no component that is quantized by msfp"
    kind = json.loads((folder / CONFIG_FILE).read_text()).get("_class_name")
    if kind is None:
        return (
            "it holds a network without a pipeline: into must be a network of the same architecture"
        )
    return f"it holds a denoiser without a pipeline: read it with {kind}.from_pretrained"


def _load_network(folder: Path, network: nn.Module) -> nn.Module:
    """Quantize a plain network in place with the contents of its two files."""
    if not is_packed(folder):
        raise InputError(f"its {CONFIG_FILE} has no quantization config of msfp")
    refuse_quantized("into", network)
    description = json.loads((folder / CONFIG_FILE).read_text())
    config = MSFPConfig.from_dict(description["quantization_config"])
    verify([folder / TENSOR_FILE], config.described, config.layers, config.products)
    tensors: dict[str, torch.Tensor] = load_file(folder / TENSOR_FILE)
    make_room(network, config.layers, config.adapters, config.router)
    make_room_for_products(network, config.products)
    check_names(set(network.state_dict()), set(tensors))
    network.load_state_dict(tensors)
    attach(
        network, config.request, summaries=config.summaries, retired=config.retired,
        coverage=config.coverage, measured=config.measured,
    )  # fmt: skip
    return network
