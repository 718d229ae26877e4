"""Empty sealed layers, to be filled with the tensors of a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from msfp.errors import InputError
from msfp.layers.block import BLOCK_LAYERS
from msfp.layers.formats import BlockFormats, LayerFormats
from msfp.layers.lora.routers import RouterKind, router_for
from msfp.layers.packed import SCALED_LAYERS, SealedLayer, add_router
from msfp.pipelines.denoiser import PlainLayer, quantizable_layers, replace_layers


def make_room(
    denoiser: nn.Module,
    formats: dict[str, LayerFormats | BlockFormats],
    entries: int,
    router: RouterKind = "learned",
) -> None:
    """Put empty sealed layers, and a router if need be, where a checkpoint's tensors will go.

    Args:
        denoiser: The plain network, on any device.
        formats: Those of the quantized layers, by name.
        entries: Entries of each layer; there is a router if more than one.
        router: The kind of that router.

    Raises:
        InputError: If the denoiser has no such layer, one in blocks is to have several entries, or
            one has another number of branches to choose from.
    """
    plain: dict[str, PlainLayer] = quantizable_layers(denoiser)
    missing = [name for name in formats if name not in plain]
    if missing:
        raise InputError(
            f"{type(denoiser).__name__} has no layer {missing[0]!r} that can be quantized, but "
            "the checkpoint does"
        )
    with torch.device("meta"):  # which takes no random numbers
        routes = router_for(router, len(formats), entries, denoiser) if entries > 1 else None
    empty: dict[nn.Module, nn.Module]
    empty = {plain[name]: _empty(plain[name], each, entries) for name, each in formats.items()}
    replace_layers(denoiser, empty)
    if routes is not None:
        device = next(denoiser.parameters()).device
        add_router(denoiser, routes.to_empty(device=device).requires_grad_(False))


def _empty(layer: PlainLayer, formats: LayerFormats | BlockFormats, entries: int) -> SealedLayer:
    """Return an empty layer with the attributes and the bias of a plain one."""
    if isinstance(formats, LayerFormats):
        if formats.branch_entries not in (1, entries):
            raise InputError(
                f"branch_entries must be the {entries} entries, not {formats.branch_entries}"
            )
        return SCALED_LAYERS[type(layer)].empty_like(layer, formats, entries)
    if entries > 1:
        raise InputError(f"entries must be 1 where layers are in block formats, not {entries}")
    return BLOCK_LAYERS[type(layer)].empty_like(layer, formats)
