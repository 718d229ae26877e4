"""What a config asks of a denoiser: the settings of each layer, and how weights are refined."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from msfp.config import (
    BLOCK_SCHEMES,
    MAX_BITS,
    LayerSettings,
    QuantizationConfig,
    RefinementConfig,
)
from msfp.errors import InputError
from msfp.layers.attention import attention_modules
from msfp.layers.selection import settings_by_layer
from msfp.search.calibration import Calibration
from msfp.search.schemes import SCHEMES, BlockScheme

SHOWN = 5
"""Number of layers that a warning names."""


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
    for name in ("refine", "attention_bits", "budget"):
        if getattr(config, name) in ("auto", None):
            continue
        if in_blocks and name != "refine":
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
    _check_branches(config, settings)
    _check_searched(config, settings)
    if config.refine != "auto":
        return config.refine
    return RefinementConfig() if SCHEMES[config.scheme].refined and recordable else None


def _check_branches(config: QuantizationConfig, settings: Mapping[str, LayerSettings]) -> None:
    """Raise InputError if a layer is to have a low-rank branch, but weights are not refined."""
    name = next((name for name, each in settings.items() if each.branch_rank), None)
    if name is not None and config.refine is None:
        rank = settings[name].branch_rank
        raise InputError(f"branch_rank of layer {name!r} must be 0 without refine, not {rank}")


def _check_searched(config: QuantizationConfig, settings: Mapping[str, LayerSettings]) -> None:
    """Raise InputError if scales of inputs are to be searched, but no inputs are in blocks."""
    if not isinstance(config.refine, RefinementConfig) or not config.refine.search_input_scales:
        return
    bits = (each.activation_bits for each in settings.values() if each.scheme in BLOCK_SCHEMES)
    if not any(each is not None and each < MAX_BITS for each in bits):
        raise InputError(
            "search_input_scales must be False where no layer has an input of less than 8 bits in "
            "a block format"
        )


def needs_trajectories(config: QuantizationConfig, refinement: RefinementConfig | None) -> bool:
    """Return whether a quantization reads recorded calls."""
    return not (refinement is None and config.attention_bits is None and config.budget is None)


def settings_of(
    denoiser: nn.Module, config: QuantizationConfig, calibration: Calibration | None
) -> dict[str, LayerSettings]:
    """Return the search settings of each layer, without layers that calibration did not run.

    Args:
        denoiser: The full-precision network.
        config: The request.
        calibration: What its calls saw, or None.

    Raises:
        InputError: If a calibration is missing or of another denoiser, or an input was not finite.
    """
    if calibration is None:
        settings = settings_by_layer(denoiser, config)
        if any(each.needs_calibration for each in settings.values()):
            raise InputError(
                "calibration must be given, such as a function that calls the pipeline or what "
                "msfp.calibrate returned, or activation_bits be None"
            )
        return settings
    settings = settings_by_layer(
        denoiser, config, calibration.ran, calibration.readers, calibration.writers
    )
    for name, each in settings.items():
        if each.needs_calibration:
            _check_input(name, calibration)
    ran = set(calibration.ran)
    idle = [name for name, each in settings.items() if each.needs_calibration and name not in ran]
    if idle:
        more = f" and {len(idle) - SHOWN} more" if len(idle) > SHOWN else ""
        warnings.warn(
            "layers that never ran during calibration stay in full precision: "
            f"{', '.join(idle[:SHOWN])}{more}",
            stacklevel=6,
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
