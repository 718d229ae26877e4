"""Taking a whole denoiser from full precision to open layers, and from those to sealed ones."""

from __future__ import annotations

from collections.abc import Callable

from diffusers import DiffusionPipeline
from torch import nn

from msfp.calibration import Calibration
from msfp.config import QuantizationConfig
from msfp.denoiser import bits_by_layer, denoiser_of, quantizable_layers, replace_layers
from msfp.diffusers_plugin import attach
from msfp.errors import InputError
from msfp.layers import quantized_layers
from msfp.open_layers import open_layers
from msfp.post_training import quantize_layer
from msfp.summary import LayerSummary


def quantize(
    pipe: DiffusionPipeline | nn.Module,
    config: QuantizationConfig,
    *,
    calibration: Calibration | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[LayerSummary]:
    """Quantize a denoiser in place.

    Args:
        pipe: A pipeline or its denoiser. The Linear, Conv1d and Conv2d layers that the config
            chooses are swapped for open quantized layers that share their parameters.
        config: Bit widths, scheme and choice of layers.
        calibration: Inputs collected by `calibrate` on the same denoiser; not needed where inputs
            are not quantized.
        progress: Called with each layer's name once it is searched.

    Returns:
        What was chosen, one summary for each layer.

    Raises:
        InputError: If the pipeline has no denoiser or one that is quantized already, no layer is
            the first or last though they are to have other bits, a glob matches nothing, the
            calibration is missing or of another denoiser, or a weight is offloaded or not finite.
            The denoiser is then as it was.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        >>> config = QuantizationConfig(weights=4, activations=None, first_last=4)
        >>> [layer.name for layer in quantize(network, config)]
        ['0', '2']
    """
    denoiser = denoiser_of(pipe)
    if quantized_layers(denoiser):
        raise InputError("the denoiser is quantized already: quantize a full-precision one")
    inputs = {} if calibration is None else calibration.inputs
    bits = bits_by_layer(denoiser, config, inputs)
    missing = [name for name, (_, of_input) in bits.items() if of_input and name not in inputs]
    if missing:
        raise InputError(
            f"calibration has no inputs for the layer {missing[0]!r}: it must be collected on the "
            "denoiser that is quantized, or activations be None"
        )
    plain = quantizable_layers(denoiser)
    searched = {}
    for name in bits:
        searched[name] = quantize_layer(
            name, plain[name], inputs.get(name), bits[name], config.scheme
        )
        if progress is not None:
            progress(name)
    replace_layers(denoiser, {plain[name]: opened for name, (opened, _) in searched.items()})
    attach(denoiser, config)
    return [summary for _, summary in searched.values()]


def seal(denoiser: nn.Module) -> None:
    """Pack the weights of every open layer of a denoiser, which then can be saved."""
    layers = open_layers(denoiser)
    replace_layers(denoiser, {layer: layer.seal() for layer in layers.values()})
    quantizer = getattr(denoiser, "hf_quantizer", None)
    if quantizer is not None:
        attach(denoiser, quantizer.quantization_config.request)
