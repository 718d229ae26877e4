"""Converting packed layers back to trainable layers, to fine-tune a checkpoint."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.layers.block import refuse_block_layers
from msfp.layers.families import family_of
from msfp.layers.kinds import KINDS
from msfp.layers.packed import packed_layers
from msfp.layers.scaled import ScaledLayer
from msfp.layers.selection import replace_layers
from msfp.layers.trainable import TrainableLayer
from msfp.pipelines.denoiser import denoiser_of
from msfp.training.teacher_check import check_weights


@torch.no_grad()
def unpack(
    model: DiffusionPipeline | nn.Module, *, original: DiffusionPipeline | nn.Module
) -> list[str]:
    """Replace packed layers by trainable ones with the same outputs, in place.

    Formats and scales are those of the packed layers. A weight is the full-precision weight if that
    rounds to the packed value. Otherwise it is the packed value: GPTQ rounds some weights
    differently, and corrections change some.

    Args:
        model: A pipeline with a packed denoiser, as loaded from a checkpoint, or the denoiser.
        original: The full-precision denoiser that `model` was made from, or a pipeline with it.
            Afterwards both share all tensors that are equal.

    Returns:
        The names of the layers.

    Raises:
        InputError: If the denoiser is not packed, has layers in block formats or was fine-tuned
            with a hub, or the original has another architecture or other weights. Nothing is
            changed then.

    Example:
        >>> import copy, msfp
        >>> network = nn.Sequential(nn.Linear(8, 8))
        >>> packed = copy.deepcopy(network)
        >>> config = msfp.QuantizationConfig(activation_bits=None, end_bits=4)
        >>> _ = msfp.quantize(packed, config)
        >>> _ = msfp.pack(packed)
        >>> unpack(packed, original=network)
        ['0']
        >>> type(packed[0]).__name__
        'TrainableLinear'
    """
    denoiser, full = denoiser_of(model), denoiser_of(original, "original")
    layers = check_unpacking(denoiser, full)
    plain = dict(full.named_modules())
    trainable: dict[nn.Module, nn.Module] = {
        layer: _trainable(layer, plain[name]) for name, layer in layers.items()
    }
    replace_layers(denoiser, trainable)
    _share(denoiser, full)
    return list(layers)


def check_unpacking(denoiser: nn.Module, original: nn.Module) -> dict[str, ScaledLayer]:
    """Return the layers that `unpack` would replace; raise InputError if it would raise one."""
    refuse_block_layers(denoiser)
    packed = packed_layers(denoiser)
    layers = {name: layer for name, layer in packed.items() if isinstance(layer, ScaledLayer)}
    if not layers:
        raise InputError("model must be quantized and packed, as msfp.load returns it")
    plain = dict(original.named_modules())
    for name, layer in layers.items():
        _check(name, layer, plain.get(name))
    check_weights(denoiser, original)
    return layers


def _check(name: str, layer: ScaledLayer, plain: nn.Module | None) -> None:
    """Raise InputError unless a packed layer can be made trainable."""
    if layer.choices > 1:
        raise InputError(
            f"layer {name} has {layer.choices} weights or low-rank branches: a denoiser that was "
            "fine-tuned with a hub cannot be fine-tuned again"
        )
    if plain is None or type(plain) not in KINDS or family_of(plain).packed is not type(layer):
        raise InputError(f"original must be the model that was quantized: it has no layer {name}")
    shape = tuple(plain.weight.shape)  # type: ignore[arg-type]
    if shape != tuple(layer.weight_shape):
        raise InputError(
            f"original must be the model that was quantized: the weight of its {name} has the "
            f"shape {shape}, not {tuple(layer.weight_shape)}"
        )


def _trainable(layer: ScaledLayer, plain: nn.Module) -> TrainableLayer:
    """Return the trainable layer of a packed one."""
    weight_quantizer, input_quantizer = layer.quantizers()
    trainable = family_of(plain).trainable.wrap(plain, weight_quantizer, input_quantizer)
    trainable.branch_input, trainable.rotation = layer.branch_quantizer(), layer.rotation
    packed = layer.quantized_weight()
    weight = trainable.weight.to(packed)
    if layer.branch_down is not None and layer.branch_up is not None:
        weight = weight - (layer.branch_up @ layer.branch_down).view_as(weight)
    weight = layer.unrotated_weight(weight)
    same = trainable.weight_quantizer(weight) == packed
    trainable.weight = nn.Parameter(torch.where(same, weight, packed), requires_grad=False)
    trainable.bias = layer.bias
    trainable.branch_down, trainable.branch_up = layer.branch_down, layer.branch_up
    return trainable


def _share(denoiser: nn.Module, original: nn.Module) -> None:
    """Let two denoisers share the tensors that are equal in both."""
    own = dict(denoiser.named_parameters())
    for name, parameter in original.named_parameters():
        if name in own and parameter.dtype == own[name].dtype and torch.equal(parameter, own[name]):
            own[name].data = parameter.data
