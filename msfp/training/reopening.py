"""Opening a packed denoiser again, to train it: the way back from sealed layers to open ones."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.layers.block import refuse_block_layers
from msfp.layers.packed import ScaledLayer, sealed_layers
from msfp.layers.trainable import OPEN_LAYERS, OpenLayer
from msfp.pipelines.denoiser import denoiser_of, replace_layers
from msfp.training.teacher_check import check_weights


@torch.no_grad()
def reopen(
    denoiser: DiffusionPipeline | nn.Module, original: DiffusionPipeline | nn.Module
) -> None:
    """Make the sealed layers of a denoiser open ones that give the same outputs.

    Formats and scales are those of the sealed layers. A weight is the full-precision one where
    that rounds to the packed value, and the packed value where other ways of rounding (GPTQ) or a
    correction made another of it.

    Args:
        denoiser: Quantized and sealed, as loaded from a checkpoint, or a pipeline with one;
            changed in place.
        original: The full-precision denoiser that it was made from, or a pipeline with that. What
            both have alike is shared from then on.

    Raises:
        InputError: If the denoiser is not sealed, has layers in block formats or was fine-tuned
            with a hub, or the original is of another architecture or has other weights. The
            denoiser is then as it was.

    Example:
        >>> import copy, msfp
        >>> network = nn.Sequential(nn.Linear(8, 8))
        >>> packed = copy.deepcopy(network)
        >>> _ = msfp.quantize(packed, msfp.QuantizationConfig(4, None, 4))
        >>> msfp.seal(packed)
        >>> reopen(packed, network)
        >>> type(packed[0]).__name__
        'OpenLinear'
    """
    denoiser, original = denoiser_of(denoiser), denoiser_of(original)
    layers = check_reopening(denoiser, original)
    plain = dict(original.named_modules())
    opened: dict[nn.Module, nn.Module] = {
        layer: _opened(layer, plain[name]) for name, layer in layers.items()
    }
    replace_layers(denoiser, opened)
    _share(denoiser, original)


def check_reopening(denoiser: nn.Module, original: nn.Module) -> dict[str, ScaledLayer]:
    """Return the layers that `reopen` would open; raise InputError where it would."""
    refuse_block_layers(denoiser)
    sealed = sealed_layers(denoiser)
    layers = {name: layer for name, layer in sealed.items() if isinstance(layer, ScaledLayer)}
    if not layers:
        raise InputError("denoiser must be quantized and sealed, as msfp.load gives it")
    plain = dict(original.named_modules())
    for name, layer in layers.items():
        _check(name, layer, plain.get(name))
    check_weights(denoiser, original)
    return layers


def _check(name: str, layer: ScaledLayer, plain: nn.Module | None) -> None:
    """Raise InputError unless a layer can be opened."""
    if layer.choices > 1:
        raise InputError(
            f"layer {name} has {layer.choices} weights or branches: a denoiser that was fine-tuned "
            "with a hub cannot be fine-tuned again"
        )
    if plain is None or OPEN_LAYERS.get(type(plain), OpenLayer).sealed_class is not type(layer):
        raise InputError(f"the teacher must be what was quantized: it has no such layer as {name}")
    shape = tuple(plain.weight.shape)  # type: ignore[arg-type]
    if shape != tuple(layer.weight_shape):
        raise InputError(
            f"the teacher must be what was quantized: the weight of its {name} has the shape "
            f"{shape}, not {tuple(layer.weight_shape)}"
        )


def _opened(layer: ScaledLayer, plain: nn.Module) -> OpenLayer:
    """Return the open layer of a sealed one."""
    weight_quantizer, input_quantizer = layer.quantizers()
    opened = OPEN_LAYERS[type(plain)].wrap(plain, weight_quantizer, input_quantizer)
    packed = layer.quantized_weight()
    weight = opened.weight.to(packed)
    if layer.branch_down is not None and layer.branch_up is not None:
        weight = weight - (layer.branch_up @ layer.branch_down).view_as(weight)
    same = opened.weight_quantizer(weight) == packed
    opened.weight = nn.Parameter(torch.where(same, weight, packed), requires_grad=False)
    opened.bias = layer.bias
    opened.branch_down, opened.branch_up = layer.branch_down, layer.branch_up
    return opened


def _share(denoiser: nn.Module, original: nn.Module) -> None:
    """Let two denoisers hold one tensor where they hold equal ones."""
    own = dict(denoiser.named_parameters())
    for name, parameter in original.named_parameters():
        if name in own and parameter.dtype == own[name].dtype and torch.equal(parameter, own[name]):
            own[name].data = parameter.data
