"""Fusing a LoRA with a packed denoiser, through the full-precision weights it was made from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from msfp.config import QuantizationConfig
from msfp.errors import InputError
from msfp.layers.adapters import adapter_layers, merge_adapters, refuse_adapters
from msfp.layers.base import refuse_quantized
from msfp.layers.packed import packed_layers
from msfp.layers.selection import quantizable_layers
from msfp.layers.trainable import trainable_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.sampler import PipelineCall
from msfp.pipelines.trajectories import Trajectories
from msfp.ptq.quantization import pack, quantize
from msfp.search.calibration import Calibration
from msfp.search.summary import LayerSummary
from msfp.support.checks import check_number
from msfp.support.progress import Progress, shown_progress
from msfp.training.teacher_check import check_weights

LoraFile = str | Path | Mapping[str, torch.Tensor]
"""A LoRA as the `load_lora_weights` of diffusers takes it."""
ADAPTER = "fused"
"""Name of the LoRA while it is loaded."""
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError,
)  # fmt: skip
"""What diffusers and PEFT raise for a file that is no LoRA of the network."""


def fuse_lora(
    model: DiffusionPipeline | nn.Module,
    lora: LoraFile,
    *,
    teacher: DiffusionPipeline | nn.Module,
    scale: float = 1.0,
    calibration: Calibration | PipelineCall | Sequence[PipelineCall] | None = None,
    trajectories: Trajectories | None = None,
    progress: Progress = shown_progress,
) -> list[LayerSummary]:
    """Fuse a LoRA with a packed denoiser, in place, so that it costs nothing more.

    The LoRA is merged into the full-precision weights. These are quantized, refined and packed as
    the config of the packed denoiser says. The result is that of `quantize` and `pack` on the
    teacher with the LoRA. If the LoRA is also for text encoders, the pipeline gets copies of these
    with the LoRA merged. Fine-tuning of the packed denoiser is lost.

    Args:
        model: A pipeline with a packed denoiser, as `load` returns it, or the denoiser.
        lora: A file, a folder, a name on the hub, or tensors by name, as `load_lora_weights` of
            diffusers takes them.
        teacher: The full-precision denoiser that `model` was made from, or a pipeline with it. It
            stays as it is. Its weights may be those of the last `fuse_lora`, to fuse another LoRA.
        scale: What the LoRA is multiplied by.
        calibration: As for `quantize`: calls of `model`, which has full-precision weights with the
            LoRA meanwhile.
        trajectories: As for `quantize`.
        progress: Called as each stage advances.

    Returns:
        One summary for each layer, as `quantize` returns them.

    Raises:
        InputError: If the denoiser is not packed or was fine-tuned with a hub, one of the two has
            LoRAs loaded or is offloaded, the teacher has another architecture, dtype or other
            weights, or the LoRA cannot be read or changes no layer. Also as `quantize` does. The
            model is then unchanged.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> import copy, msfp
        >>> teacher = UNet2DConditionModel(
        ...     block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
        ...     up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8, layers_per_block=1)
        >>> packed, config = copy.deepcopy(teacher), msfp.QuantizationConfig(activation_bits=None)
        >>> _ = msfp.quantize(packed, config)
        >>> _ = msfp.pack(packed)
        >>> name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        >>> lora = {f"{name}.lora_A.weight": torch.randn(2, 32),
        ...         f"{name}.lora_B.weight": torch.randn(32, 2)}
        >>> summaries = fuse_lora(packed, lora, teacher=teacher, scale=0.5)
    """
    denoiser, full = denoiser_of(model), denoiser_of(teacher, "teacher")
    check_number("scale", scale, -math.inf, math.inf)
    _check_packed(denoiser)
    _check_teacher(denoiser, full)
    merged, others = _with_lora(model, teacher, lora, scale)
    quantizer: Any = denoiser.hf_quantizer
    config: QuantizationConfig = quantizer.quantization_config.request
    with _instead(model, denoiser, merged, others):
        summaries = quantize(
            model, config, calibration=calibration, trajectories=trajectories, progress=progress
        )
        pack(model)
    return summaries


def _check_packed(denoiser: nn.Module) -> None:
    """Raise InputError unless a LoRA can be fused with a denoiser."""
    layers = packed_layers(denoiser)
    if not layers or trainable_layers(denoiser):
        raise InputError("model must be quantized and packed, as msfp.load returns it")
    if any(layer.choices > 1 for layer in layers.values()):
        raise InputError("model was fine-tuned with a hub, with which no LoRA can be fused")
    refuse_adapters("model", denoiser)
    _refuse_offloaded("model", denoiser)


def _check_teacher(denoiser: nn.Module, full: nn.Module) -> None:
    """Raise InputError unless a packed denoiser was made from a full-precision one."""
    refuse_quantized("teacher", full)
    refuse_adapters("teacher", full)
    _refuse_offloaded("teacher", full)
    kind, other = type(denoiser).__name__, type(full).__name__
    if kind != other:
        raise InputError(f"teacher must be the model that was quantized, a {kind}, not a {other}")
    plain = quantizable_layers(full)
    for name, layer in packed_layers(denoiser).items():
        if name not in plain or plain[name].weight.shape != layer.weight_shape:
            raise InputError(
                f"teacher must be the model that was quantized, but its layer {name} is another"
            )
    check_weights(denoiser, full, "teacher")
    own = dict(denoiser.named_parameters())
    for name, value in full.named_parameters():
        if name in own and own[name].dtype != value.dtype:
            raise InputError(
                f"teacher must have the dtype of model: its {name} is {value.dtype}, not "
                f"{own[name].dtype}"
            )


def _refuse_offloaded(name: str, network: nn.Module) -> None:
    """Raise InputError if accelerate moves the weights of a network."""
    if any(hasattr(module, "_hf_hook") for module in network.modules()):
        raise InputError(f"{name} is offloaded: call remove_all_hooks() on the pipeline first")


def _with_lora(
    model: DiffusionPipeline | nn.Module,
    teacher: DiffusionPipeline | nn.Module,
    lora: LoraFile,
    scale: float,
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return the teacher's denoiser with a LoRA merged, and text encoders that have it too.

    They share all other tensors with the teacher, and are on the device of the model.
    """
    if not isinstance(lora, str | Path | Mapping):
        raise InputError(f"lora must be a path, a name or tensors by name, not {lora!r}")
    full = _sharing(denoiser_of(teacher))
    given = dict(lora) if isinstance(lora, Mapping) else lora  # the loader takes tensors out
    pipes = [each for each in (teacher, model) if hasattr(each, "load_lora_weights")]
    try:
        copies = _loaded(pipes[0], full, given) if pipes else _loaded_alone(full, given)
    except UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"lora cannot be loaded: {why}") from error
    if not adapter_layers(full):
        raise InputError(f"lora has no layer of {type(full).__name__}")
    device = next(denoiser_of(model).parameters()).device
    for network in (full, *copies.values()):
        for layer in adapter_layers(network).values():
            layer.scale_layer(scale)
        merge_adapters(network.to(device))
    return full, copies


def _sharing(network: nn.Module) -> nn.Module:
    """Return a copy of a network that shares its tensors."""
    memo: dict[int, Any] = {id(value): value for value in network.buffers()}
    for value in network.parameters():
        # Of its own, so that moving the copy leaves the network where it is.
        memo[id(value)] = nn.Parameter(value.data, requires_grad=value.requires_grad)
    return copy.deepcopy(network, memo)


def _loaded(pipe: Any, full: nn.Module, lora: Any) -> dict[str, nn.Module]:
    """Load a LoRA as a pipeline does, but into a denoiser and into copies of text encoders.

    Returns:
        The copies that got a part of it, by component.
    """
    target, *names = pipe._lora_loadable_modules
    shadow = copy.copy(pipe)
    setattr(shadow, target, full)
    copies = {}
    for name in names:
        if isinstance(getattr(pipe, name, None), nn.Module):
            copies[name] = _sharing(getattr(pipe, name))
            setattr(shadow, name, copies[name])
    shadow.load_lora_weights(lora, adapter_name=ADAPTER)
    return {name: network for name, network in copies.items() if adapter_layers(network)}


def _loaded_alone(full: Any, lora: Any) -> dict[str, nn.Module]:
    """Load a LoRA into a denoiser without a pipeline, and return that nothing else got it."""
    if not hasattr(full, "load_lora_adapter"):
        raise InputError(f"model is a {type(full).__name__}, for which diffusers loads no LoRAs")
    prefix = "unet" if "UNet" in type(full).__name__ else "transformer"
    full.load_lora_adapter(lora, prefix=prefix, adapter_name=ADAPTER)
    return {}


@contextmanager
def _instead(
    model: Any, denoiser: nn.Module, other: nn.Module, components: Mapping[str, nn.Module]
) -> Iterator[None]:
    """Let a denoiser become another of its class, and put it back after an error.

    Args:
        model: A pipeline or the denoiser.
        denoiser: The denoiser, which stays the same object.
        other: What it becomes.
        components: Further components of the pipeline to replace.
    """
    parts = components if model is not denoiser else {}
    before = {name: getattr(model, name) for name in parts}
    _exchange(denoiser, other)
    try:
        for name, each in parts.items():
            setattr(model, name, each)
        yield
    except BaseException:
        _exchange(denoiser, other)
        for name, each in before.items():
            setattr(model, name, each)
        raise


def _exchange(one: nn.Module, other: nn.Module) -> None:
    """Exchange all that two networks of one class hold."""
    first, second = vars(one), vars(other)
    object.__setattr__(one, "__dict__", second)
    object.__setattr__(other, "__dict__", first)
