"""Choice of the layers to quantize, and the search settings of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from msfp.config import FIRST_LAYERS, LAST_LAYERS, LayerSettings, QuantizationConfig
from msfp.errors import InputError
from msfp.layers.kinds import KINDS, PlainLayer
from msfp.support.globs import matches

ADDED = {"base_layer", "modules_to_save", "processor"}
"""Modules around the layers of PEFT and of IP-Adapters."""


def quantizable_layers(denoiser: nn.Module) -> dict[str, PlainLayer]:
    """Return every layer that can be quantized, by dotted name, in definition order.

    Layers of subclasses are excluded, because their computation may differ.
    """
    return {name: module for name, module in denoiser.named_modules() if type(module) in KINDS}


def refuse_additions(names: Iterable[str]) -> None:
    """Raise InputError if a denoiser has what diffusers adds to it after it is made.

    These are LoRAs of PEFT, IP-Adapters and fused projections. A checkpoint with them cannot be
    loaded, because the denoiser is then made without them.

    Args:
        names: The names of the denoiser's tensors.
    """
    modules = {name.rpartition(".")[0] for name in names}
    for module in sorted(modules):
        parent, _, leaf = module.rpartition(".")
        fused = leaf in ("to_qkv", "to_kv") and f"{parent}.to_v" in modules
        if fused or not ADDED.isdisjoint(module.split(".")):
            raise InputError(
                f"{module!r} was added to the denoiser: unload LoRAs and IP-Adapters, and call "
                "unfuse_qkv_projections(), before it is quantized, saved or inspected"
            )


def settings_by_layer(
    denoiser: nn.Module,
    config: QuantizationConfig,
    executed: Iterable[str] | None = None,
    readers: Sequence[str] = (),
    writers: Sequence[str] = (),
) -> dict[str, LayerSettings]:
    """Return the search settings of each layer that a config selects.

    Args:
        denoiser: The full-precision network.
        config: Search settings and the selection of layers.
        executed: Names of layers in the order in which they run, or None if unknown.
        readers: Those that read the noisy sample, or none if unknown.
        writers: Those that write the prediction, or none if unknown.

    Returns:
        Settings by layer name, in definition order.

    Raises:
        InputError: If the network is a layer itself, a LoRA or the like was added to it, a glob of
            `include`, `exclude` or `overrides` matches no layer, no layer is selected, an override
            is out of range, or the first or last layer has different bits and is not found.
    """
    layers = list(quantizable_layers(denoiser))
    kind = type(denoiser).__name__
    if "" in layers:  # the root itself, which cannot be replaced
        raise InputError(
            f"the network must hold its layers in a module, such as Sequential: it is a {kind}"
        )
    refuse_additions(denoiser.state_dict())
    chosen = _matching(layers, "include", config.include, kind)
    chosen -= _matching(layers, "exclude", config.exclude, kind)
    if not chosen:
        raise InputError(f"include and exclude leave no layer of {kind} to quantize")
    found = {"first_layers": readers, "last_layers": writers}
    ends = _ends(layers, config, None if executed is None else list(executed), found, kind)
    settings = {name: config.settings("first" if name in ends else "inner") for name in layers}
    for glob, changes in config.overrides.items():
        for name in _matching(layers, "overrides", (glob,), kind):
            settings[name] = settings[name]._replace(**changes)
            settings[name].check()
    return {name: settings[name] for name in layers if name in chosen}


def _matching(layers: list[str], argument: str, globs: tuple[str, ...], kind: str) -> set[str]:
    """Return the layers whose name, or the name of a module around them, matches a glob."""
    found: set[str] = set()
    for glob in globs:
        some = {name for name in layers if matches(name, glob)}
        if not some:
            raise InputError(f"{argument} has {glob!r}, which matches no layer of {kind}")
        found |= some
    return found


def _ends(
    layers: list[str],
    config: QuantizationConfig,
    executed: list[str] | None,
    found: Mapping[str, Sequence[str]],
    kind: str,
) -> set[str]:
    """Return the first and last layers if their bits differ from the others, or else no layer.

    These are the layers that were found to read the sample and to write the prediction. If none
    were, and where the config names others than by default, they are found by name.
    """
    if config.bits("first") == config.bits("inner"):
        return set()
    ends: set[str] = set()
    for end, globs, usual, index in (
        ("first_layers", config.first_layers, FIRST_LAYERS, 0),
        ("last_layers", config.last_layers, LAST_LAYERS, -1),
    ):
        known = {name for name in found[end] if name in layers}
        if known and globs == usual:
            ends |= known
            continue
        named = {name for name in layers if any(fnmatchcase(name, glob) for glob in globs)}
        if not named and not executed:
            raise InputError(
                f"{kind} has no layer named {' or '.join(globs) or 'so'}, so end_bits cannot be "
                f"applied: name it in {end}, or set end_bits to the other bits"
            )
        ends |= named or {executed[index]}  # type: ignore[index]
    return ends


def replace_layers(denoiser: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Replace layers of a denoiser by others wherever they occur, in place."""
    for module in list(denoiser.modules()):
        for name, child in list(module._modules.items()):
            if child in replacements:
                setattr(module, name, replacements[child])
                if isinstance(module, nn.TransformerEncoderLayer):
                    # Otherwise torch fuses the layer, and reads the weights without calling layers.
                    module.activation_relu_or_gelu = 0
