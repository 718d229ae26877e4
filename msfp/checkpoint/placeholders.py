"""Placeholders: empty packed layers, to be filled with the tensors of a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from msfp.errors import InputError
from msfp.layers.families import family_of
from msfp.layers.formats import TOKEN, BlockFormats, LayerFormats, can_rotate
from msfp.layers.kinds import PlainLayer, kind_of
from msfp.layers.lora.routers import ROUTERS
from msfp.layers.packed import PackedLayer, add_router
from msfp.layers.selection import quantizable_layers, replace_layers


def make_room(
    denoiser: nn.Module,
    formats: dict[str, LayerFormats | BlockFormats],
    adapters: int,
    router: str = "learned",
) -> None:
    """Insert empty packed layers, and a router if needed, for the tensors of a checkpoint.

    Args:
        denoiser: The plain network, on any device.
        formats: Formats of the quantized layers, by name.
        adapters: Number of adapters of each layer; more than one need a router.
        router: The kind of that router, a key of `ROUTERS`.

    Raises:
        InputError: If the denoiser has no such layer, a convolution has a scale for each token, a
            layer in block formats has several
            adapters, or a layer has another number of low-rank branches to choose from.
    """
    plain: dict[str, PlainLayer] = quantizable_layers(denoiser)
    missing = [name for name in formats if name not in plain]
    if missing:
        raise InputError(
            f"{type(denoiser).__name__} has no layer {missing[0]!r} that can be quantized, but "
            "the checkpoint does"
        )
    for name, each in formats.items():
        if each.to_dict()["input_granularity"] == TOKEN and kind_of(plain[name]).places:
            raise InputError(f"layer {name!r}: input_granularity 'token' is for linear layers")
        if each.rotation > 1 and not can_rotate(plain[name], each.rotation):
            raise InputError(
                f"layer {name!r}: input_rotation must be 16, 64 or 256 and divide its input "
                f"channels, which are in one group, not {each.rotation}"
            )
    with torch.device("meta"):  # draws no random numbers
        kind = ROUTERS[router]
        routes = kind.placeholder(len(formats), adapters, denoiser) if adapters > 1 else None
    empty: dict[nn.Module, nn.Module]
    empty = {plain[name]: _empty(plain[name], each, adapters) for name, each in formats.items()}
    replace_layers(denoiser, empty)
    if routes is not None:
        device = next(denoiser.parameters()).device
        add_router(denoiser, routes.to_empty(device=device).requires_grad_(False))


def _empty(layer: PlainLayer, formats: LayerFormats | BlockFormats, adapters: int) -> PackedLayer:
    """Return an empty layer with the attributes and the bias of a plain one."""
    if isinstance(formats, LayerFormats):
        if formats.branch_adapters not in (1, adapters):
            raise InputError(
                f"branch_adapters must be the {adapters} adapters, not {formats.branch_adapters}"
            )
        return family_of(layer).packed.empty_like(layer, formats, adapters)
    if adapters > 1:
        raise InputError(f"adapters must be 1 where layers are in block formats, not {adapters}")
    return family_of(layer).block.empty_like(layer, formats)
