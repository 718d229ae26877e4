"""Taking a whole denoiser from full precision to open layers, and from those to sealed ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from diffusers import DiffusionPipeline
from torch import nn

from msfp.block_layers import block_layers, refuse_block_layers
from msfp.calibration import Calibration
from msfp.config import BLOCK_BITS, LayerSettings, QuantizationConfig
from msfp.denoiser import denoiser_of, quantizable_layers, replace_layers, settings_by_layer
from msfp.diffusers_plugin import attach
from msfp.errors import InputError
from msfp.layers import quantized_layers
from msfp.observation import calibrate
from msfp.open_layers import open_layers
from msfp.post_training import quantize_layer
from msfp.sampling import PipelineCall
from msfp.summary import LayerSummary


def quantize(
    pipe: DiffusionPipeline | nn.Module,
    config: QuantizationConfig,
    *,
    calibration: Calibration | PipelineCall | Sequence[PipelineCall] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[LayerSummary]:
    """Quantize a denoiser in place.

    Args:
        pipe: A pipeline or its denoiser. The Linear, Conv1d and Conv2d layers that the config
            chooses are swapped for open quantized layers that share their parameters; those of
            block schemes for `msfp.block_layers`.
        config: Bit widths, scheme and choice of layers.
        calibration: What `calibrate` saw of the same denoiser, or the calls of the pipeline that
            it is to make. Not needed where inputs are not quantized, or to block formats.
        progress: Called with each layer's name once it is searched.

    Returns:
        What was chosen, one summary for each layer.

    Raises:
        InputError: If the pipeline has no denoiser or one that is quantized already, no layer is
            the first or last though they are to have other bits, a glob matches nothing, the
            calibration is missing or of another denoiser, or a weight or an input is not finite,
            or a weight offloaded. The denoiser is then as it was.

    Warns:
        UserWarning: If layers never ran during calibration. They are left in full precision.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        >>> config = QuantizationConfig(weights=4, activations=None, first_last=4)
        >>> [layer.name for layer in quantize(network, config)]
        ['0', '2']
    """
    denoiser = denoiser_of(pipe)
    if quantized_layers(denoiser) or block_layers(denoiser):
        raise InputError("the denoiser is quantized already: quantize a full-precision one")
    plain = quantizable_layers(denoiser)
    settings_by_layer(denoiser, config, plain)  # what is wrong is said before calibration runs
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = calibrate(pipe, calibration)
    settings = _settings(denoiser, config, calibration)
    searched = {}
    for name, each in settings.items():
        searched[name] = quantize_layer(name, plain[name], each, calibration)
        if progress is not None:
            progress(name)
    replace_layers(denoiser, {plain[name]: layer for name, (layer, _) in searched.items()})
    summaries = [summary for _, summary in searched.values()]
    attach(denoiser, config, summaries=summaries)
    return summaries


def _settings(
    denoiser: nn.Module, config: QuantizationConfig, calibration: Calibration | None
) -> dict[str, LayerSettings]:
    """Return what is to be searched for each layer, of which calibration knows what is needed."""
    if calibration is None:
        settings = settings_by_layer(denoiser, config)
        if any(_needs_input(each) for each in settings.values()):
            raise InputError(
                "calibration must be given, such as a function that calls the pipeline or what "
                "msfp.calibrate returned, or activations be None"
            )
        return settings
    settings = settings_by_layer(denoiser, config, calibration.ran)
    for name, each in settings.items():
        if _needs_input(each):
            _check_input(name, calibration)
    ran = set(calibration.ran)
    idle = [name for name, each in settings.items() if _needs_input(each) and name not in ran]
    if idle:
        warnings.warn(
            f"{len(idle)} layers never ran during calibration and stay in full precision: "
            f"{', '.join(idle[:5])}",
            stacklevel=3,
        )
    return {name: each for name, each in settings.items() if name not in idle}


def _needs_input(settings: LayerSettings) -> bool:
    """Return whether the search needs to know a layer's input."""
    return settings.activations is not None and settings.scheme not in BLOCK_BITS


def _check_input(name: str, calibration: Calibration) -> None:
    """Raise InputError unless a calibration knows a layer, and saw finite numbers alone."""
    if name not in calibration.inputs:
        raise InputError(
            f"calibration has no inputs for the layer {name!r}: it must be made with the denoiser "
            "that is quantized"
        )
    nonfinite = calibration.inputs[name].nonfinite
    if nonfinite:
        raise InputError(
            f"the input of layer {name!r} had {nonfinite} numbers that are NaN or infinite "
            "during calibration: does the pipeline give proper images in this dtype?"
        )


def seal(denoiser: nn.Module) -> None:
    """Pack the weights of every open layer of a denoiser, which then can be saved.

    Raises:
        InputError: If it has layers in block formats.
    """
    refuse_block_layers(denoiser)
    layers = open_layers(denoiser)
    replace_layers(denoiser, {layer: layer.seal() for layer in layers.values()})
    quantizer = getattr(denoiser, "hf_quantizer", None)
    if quantizer is not None:
        config = quantizer.quantization_config
        attach(denoiser, config.request, summaries=config.summaries)
