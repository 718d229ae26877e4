"""Exporting fine-tuned denoisers for other programs: a checkpoint for each LoRA, or a LoRA file.

A denoiser with LoRAs inside the quantizer has a set of codes for each LoRA. A denoiser with LoRAs
beside the weights has low-rank branches, each of which is an ordinary LoRA on top of a packed
checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.checkpoint.io import save
from msfp.errors import InputError
from msfp.layers.block import BlockLayer
from msfp.layers.formats import LayerFormats
from msfp.layers.kinds import groups_of
from msfp.layers.lora.talora import remove_router
from msfp.layers.packed import PackedLayer, packed_layers
from msfp.layers.scaled import ScaledLayer
from msfp.pipelines.denoiser import denoiser_name, denoiser_of
from msfp.support.checks import check_path, check_type
from msfp.support.files import atomic_folder

LORA_FILE = "pytorch_lora_weights.safetensors"


def export_adapters(model: DiffusionPipeline, folder: str | Path) -> list[Path]:
    """Write a plain packed checkpoint for each LoRA of the hub, with that LoRA in all layers.

    Args:
        model: A pipeline whose denoiser was fine-tuned with a hub of several LoRAs, and packed.
        folder: A new or an empty folder.

    Returns:
        The folders of the checkpoints, `adapter-0` and so on.

    Raises:
        InputError: If the denoiser has no hub of several LoRAs.
    """
    check_type("model", model, DiffusionPipeline)
    denoiser = denoiser_of(model)
    adapters = max((layer.choices for layer in packed_layers(denoiser).values()), default=1)
    if adapters < 2:
        raise InputError("model must have been fine-tuned with a hub of several LoRAs, and packed")
    folder = check_path("folder", folder)
    names = [f"adapter-{adapter}" for adapter in range(adapters)]
    with atomic_folder(folder) as partial:
        for adapter, name in enumerate(names):
            with _in_place_of(model, _single(denoiser, adapter)):
                save(model, partial / name)
    return [folder / name for name in names]


def export_lora(model: DiffusionPipeline, folder: str | Path) -> Path:
    """Write a packed checkpoint without its low-rank branches, and these as a diffusers LoRA file.

    Read the checkpoint with `pipe = msfp.load(folder)`, then the LoRA with
    `pipe.load_lora_weights(folder)`. The pipelines of Stable Diffusion and Flux have that method.
    `DDIMPipeline`, `DiTPipeline`, PixArt's pipelines and msfp's own do not have it: use PEFT to add
    the LoRA to their denoiser (docs/fine-tuning.md shows how). Where a branch has 8 bits, outputs
    with the LoRA differ a little, because a LoRA is computed in full precision.

    Args:
        model: A pipeline whose denoiser has low-rank branches beside its weights, and is packed.
        folder: A new or an empty folder.

    Returns:
        The LoRA file, whose keys are those of PEFT.

    Raises:
        InputError: If the denoiser has no low-rank branches, several to choose from, or one of a
            grouped convolution, which PEFT does not support.
    """
    check_type("model", model, DiffusionPipeline)
    tensors = lora_tensors(model)
    bare = copy.deepcopy(denoiser_of(model))
    for layer in packed_layers(bare).values():
        if isinstance(layer, ScaledLayer | BlockLayer):
            layer.remove_branch()
    attach_again(bare)
    folder = check_path("folder", folder)
    with atomic_folder(folder) as partial:
        with _in_place_of(model, bare):
            save(model, partial)
        save_file(tensors, partial / LORA_FILE, metadata={"format": "pt"})
    return folder / LORA_FILE


def lora_tensors(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """Return a pipeline's low-rank branches under the keys of diffusers' LoRA files.

    Raises:
        InputError: As `export_lora` does.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in packed_layers(denoiser_of(pipe)).items():
        if layer.branch_down is None or layer.branch_up is None:
            continue
        if layer.choices > 1:
            raise InputError(
                f"model must have one LoRA beside each weight, not {layer.choices} that a router "
                "chooses from: export_adapters writes a checkpoint for each, which can be exported"
            )
        if groups_of(layer) > 1:
            raise InputError(
                f"layer {name} is a grouped convolution, and PEFT does not support LoRAs of "
                "grouped convolutions"
            )
        key = f"{denoiser_name(pipe)}.{name}"
        shape = layer.weight_shape[1:]
        down, up = layer.branch_down.detach(), layer.branch_up.detach()
        tensors[f"{key}.lora_A.weight"] = down.reshape(-1, *shape).contiguous()
        tensors[f"{key}.lora_B.weight"] = up.reshape(*up.shape, *(1,) * (len(shape) - 1)).clone()
    if not tensors:
        raise InputError("model must have been fine-tuned with LoRAs beside weights, and packed")
    return tensors


def _single(denoiser: nn.Module, adapter: int) -> nn.Module:
    """Return a copy of a denoiser with only one adapter in each layer, and without a router."""
    single = copy.deepcopy(denoiser)
    for layer in packed_layers(single).values():
        _keep_adapter(layer, adapter)
    remove_router(single)
    attach_again(single)
    return single


def _keep_adapter(layer: PackedLayer, adapter: int) -> None:
    """Remove all adapters of a layer except one."""
    layer.routing = None
    if layer.adapters == 1:
        _keep_branch(layer, adapter)
        return
    cached = layer.cache is not None
    codes = layer.codes.view(layer.adapters, -1)[adapter].clone()
    layer.codes = nn.Parameter(codes, requires_grad=False)
    layer.adapters = 1
    layer.cache_weight(cached)


def _keep_branch(layer: PackedLayer, adapter: int) -> None:
    """Remove all low-rank branches of a layer except one."""
    if not isinstance(layer.formats, LayerFormats):
        return
    layer.formats = replace(layer.formats, branch_adapters=1)
    for name in ("branch_down", "branch_up"):
        factor = getattr(layer, name)[adapter].clone()
        setattr(layer, name, nn.Parameter(factor, requires_grad=False))


@contextmanager
def _in_place_of(pipe: DiffusionPipeline, denoiser: nn.Module) -> Iterator[None]:
    """Give a pipeline another denoiser inside the `with` block."""
    name, own = denoiser_name(pipe), denoiser_of(pipe)
    setattr(pipe, name, denoiser)
    try:
        yield
    finally:
        setattr(pipe, name, own)
