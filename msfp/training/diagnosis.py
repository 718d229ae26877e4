"""Finding the first layer whose output is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from msfp.layers.trainable import TrainableLayer, trainable_layers
from msfp.support.hooks import hooked


def first_nonfinite(denoiser: nn.Module, forward: Callable[[], object]) -> str | None:
    """Return the first layer whose output has NaN or infinity in a forward pass, or None.

    Args:
        denoiser: The denoiser. A trainable layer counts as one layer, without its parts. Other
            modules count if they have no submodules.
        forward: Runs a forward pass of the denoiser.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> _ = network[1].bias.data.fill_(torch.nan)
        >>> first_nonfinite(network, lambda: network(torch.ones(1, 1)))
        '1'
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_layer: nn.Module, _args: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
                found.append(name)

        return look

    layers = trainable_layers(denoiser).values()
    parts = {part for layer in layers for part in layer.modules() if part is not layer}
    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in denoiser.named_modules()
        if isinstance(module, TrainableLayer) or not (list(module.children()) or module in parts)
    ]
    with hooked(hooks), torch.no_grad():
        forward()
    return found[0] if found else None
