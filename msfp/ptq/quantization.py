"""Quantizing a whole denoiser: from full precision to trainable layers, then to packed layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from diffusers import DiffusionPipeline
from torch import nn

from msfp.checkpoint.diffusers_quantizer import attach, attach_again
from msfp.config import LayerSettings, QuantizationConfig, RefinementConfig
from msfp.errors import InputError
from msfp.layers.attention import attention_modules
from msfp.layers.base import refuse_quantized
from msfp.layers.selection import quantizable_layers, replace_layers, settings_by_layer
from msfp.layers.trainable import trainable_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.recording import Recording
from msfp.pipelines.sampler import PipelineCall, check_calls
from msfp.pipelines.trajectories import Trajectories
from msfp.ptq.attention_products import quantize_attention
from msfp.ptq.refinement import refine
from msfp.search.calibration import Calibration
from msfp.search.layer_search import quantize_layer
from msfp.search.observers import calibrate
from msfp.search.schemes import SCHEMES, BlockScheme
from msfp.search.summary import LayerSummary
from msfp.support.checks import check_type
from msfp.support.malloc import release_memory
from msfp.support.progress import Progress, counted, no_progress


def quantize(
    model: DiffusionPipeline | nn.Module,
    config: QuantizationConfig | None = None,
    *,
    calibration: Calibration | PipelineCall | Sequence[PipelineCall] | None = None,
    trajectories: Trajectories | None = None,
    progress: Progress = no_progress,
) -> list[LayerSummary]:
    """Quantize a denoiser in place.

    Trainable quantized layers replace the layers that the config selects, and share their
    parameters. With block schemes, packed layers replace them, as in `msfp.layers.block`.

    Args:
        model: A pipeline or its denoiser, in full precision.
        config: Bit widths, scheme, selection of layers, and refinement of weights; None for the
            defaults.
        calibration: The result of `calibrate` for the same denoiser, or calls of the pipeline to
            calibrate with. Not needed if inputs are not quantized, or use block formats.
        trajectories: The result of `record_trajectories` for the same denoiser, to refine weights
            with. Not needed if `calibration` is calls: these are recorded while they run.
        progress: Called as each stage advances.

    Returns:
        One summary for each layer, with the formats chosen.

    Raises:
        InputError: If the pipeline has no denoiser, the denoiser is quantized already or is a layer
            itself, an argument has the wrong type, no first or last layer is found although these
            have other bits, a glob matches nothing, the calibration is missing or belongs to
            another denoiser, the config asks for refinement without calls or trajectories, a weight
            or an input is not finite, or a weight is offloaded. The denoiser is then unchanged.

    Warns:
        UserWarning: If layers never ran during calibration; they stay in full precision. Also if
            the calls cannot be recorded; weights are then rounded to the nearest value.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        >>> config = QuantizationConfig(weight_bits=4, activation_bits=None, end_bits=4)
        >>> [layer.name for layer in quantize(network, config)]
        ['0', '2']
    """
    denoiser = denoiser_of(model)
    config = QuantizationConfig() if config is None else config
    check_type("config", config, QuantizationConfig)
    if trajectories is not None:
        check_type("trajectories", trajectories, Trajectories)
    if not isinstance(calibration, Calibration | None):
        calibration = check_calls("calibration", calibration, " or what msfp.calibrate returned")
    refuse_quantized("the denoiser", denoiser)
    plain = quantizable_layers(denoiser)
    settings = settings_by_layer(denoiser, config, plain)
    seen = calibration if isinstance(calibration, Calibration) else None
    calls = None if isinstance(calibration, Calibration) else calibration
    # Errors are raised before anything runs.
    recordable = calls is not None or trajectories is not None
    refinement = refinement_of(denoiser, config, settings, recordable=recordable)
    if calls is not None:
        if trajectories is None and (refinement or config.attention_bits):
            recording = Recording(calls)
            seen = calibrate(model, calls=recording.calls, progress=progress)
            trajectories = _recorded(model, recording, config)
        else:
            seen = calibrate(model, calls=calls, progress=progress)
    settings = _settings(denoiser, config, seen)
    if trajectories is None:
        refinement = None
    found = counted(progress, "searching", len(settings))
    searched = {}
    for name, each in settings.items():
        searched[name] = quantize_layer(name, plain[name], each, seen)
        release_memory()
        found(1)
    swapped: dict[nn.Module, nn.Module]
    swapped = {plain[name]: layer for name, (layer, _) in searched.items()}
    replace_layers(denoiser, swapped)
    try:
        if trajectories is not None and refinement is not None:
            refine(denoiser, refinement, trajectories=trajectories, progress=progress)
        if trajectories is not None and config.attention_bits is not None:
            quantize_attention(denoiser, config.attention_bits, trajectories=trajectories)
    except BaseException:
        replace_layers(denoiser, {layer: old for old, layer in swapped.items()})
        raise
    summaries = [summary.with_formats(layer.formats) for layer, summary in searched.values()]
    attach(denoiser, replace(config, refine=refinement), summaries=summaries)
    return summaries


def refinement_of(
    denoiser: nn.Module,
    config: QuantizationConfig,
    settings: dict[str, LayerSettings],
    *,
    recordable: bool,
) -> RefinementConfig | None:
    """Return how to refine weights; raise InputError if the request cannot be met.

    Args:
        denoiser: The full-precision network.
        config: The request.
        settings: The search settings of each layer.
        recordable: Whether calls or trajectories are given.
    """
    in_blocks = any(isinstance(SCHEMES[each.scheme], BlockScheme) for each in settings.values())
    for name in ("refine", "attention_bits"):
        if getattr(config, name) in ("auto", None):
            continue
        if in_blocks:
            raise InputError(f"{name} must be None where layers are in block formats")
        if not recordable:
            raise InputError(
                f"{name} needs calls of the pipeline as calibration, or trajectories that "
                "msfp.record_trajectories recorded"
            )
    if config.attention_bits is not None and not attention_modules(denoiser):
        raise InputError(
            f"attention_bits must be None: {type(denoiser).__name__} has no attention module"
        )
    if config.refine != "auto":
        return config.refine
    suited = SCHEMES[config.scheme].refined and not in_blocks
    return RefinementConfig() if suited and recordable else None


def _recorded(
    model: DiffusionPipeline | nn.Module, recording: Recording, config: QuantizationConfig
) -> Trajectories | None:
    """Return the trajectories of calls, or None if they cannot be recorded and are optional."""
    try:
        return recording.trajectories(model)
    except InputError as error:
        if config.refine != "auto" or config.attention_bits is not None:
            raise
        warnings.warn(f"weights are rounded to nearest and not refined: {error}", stacklevel=3)
        return None


def _settings(
    denoiser: nn.Module, config: QuantizationConfig, calibration: Calibration | None
) -> dict[str, LayerSettings]:
    """Return the search settings of each layer, without layers that calibration did not run."""
    if calibration is None:
        settings = settings_by_layer(denoiser, config)
        if any(each.needs_calibration for each in settings.values()):
            raise InputError(
                "calibration must be given, such as a function that calls the pipeline or what "
                "msfp.calibrate returned, or activation_bits be None"
            )
        return settings
    settings = settings_by_layer(denoiser, config, calibration.ran, calibration.sample_path)
    for name, each in settings.items():
        if each.needs_calibration:
            _check_input(name, calibration)
    ran = set(calibration.ran)
    idle = [name for name, each in settings.items() if each.needs_calibration and name not in ran]
    if idle:
        warnings.warn(
            f"{len(idle)} layers never ran during calibration and stay in full precision: "
            f"{', '.join(idle[:5])}",
            stacklevel=3,
        )
    return {name: each for name, each in settings.items() if name not in idle}


def _check_input(name: str, calibration: Calibration) -> None:
    """Raise InputError unless a calibration contains a layer, with finite inputs only."""
    if name not in calibration.inputs:
        raise InputError(
            f"calibration has no inputs for the layer {name!r}: it must be made with the denoiser "
            "that is quantized"
        )
    nonfinite = calibration.inputs[name].nonfinite
    if nonfinite:
        raise InputError(
            f"the input of layer {name!r} had {nonfinite} numbers that are NaN or infinite "
            "during calibration: check that the pipeline generates correct images in this dtype"
        )


def pack(model: DiffusionPipeline | nn.Module) -> list[str]:
    """Replace trainable layers by packed ones, in place; the denoiser can then be saved.

    Args:
        model: A pipeline or its denoiser, quantized by `quantize`.

    Returns:
        The names of the layers.

    Raises:
        InputError: If the pipeline has no denoiser.
    """
    denoiser = denoiser_of(model)
    trainable = trainable_layers(denoiser)
    names, layers = list(trainable), list(trainable.values())
    del trainable
    while layers:  # one by one, to free each full-precision weight early
        layer = layers.pop()
        replace_layers(denoiser, {layer: layer.pack()})
    attach_again(denoiser)
    return names
