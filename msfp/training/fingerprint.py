"""The fingerprint of a run of training: what must be equal for it to resume, as JSON types.

What is read from files, such as weights and codes, has a digest. Trajectories are recorded again
when a run resumes, perhaps by other kernels: of them some numbers are compared, which may differ by
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from msfp.layers.trainable import TrainableLayer, trainable_layers
from msfp.pipelines.trajectories import Trajectories
from msfp.support.fingerprints import digest
from msfp.training.config import FinetuneConfig

ROWS, VALUES = 512, 8
"""The most rows of a path that are told apart, and numbers of each."""


def run_fingerprint(
    denoiser: nn.Module,
    path: Trajectories,
    config: FinetuneConfig,
    weights: torch.Tensor | None = None,
    held_out: Trajectories | None = None,
) -> dict[str, Any]:
    """Return what must be equal for a run to resume, as JSON gives it back.

    Args:
        denoiser: Quantized and trainable, before it has hubs.
        path: What is trained on.
        config: What is trained and how.
        weights: The loss weight of each timestep.
        held_out: What errors are measured on, or None.
    """
    options = config.to_dict()
    del options["shard"]  # it has the same result
    return {
        **{
            f"layer {name}": f"{layer.formats}, shape {tuple(layer.weight.shape)}"
            for name, layer in trainable_layers(denoiser).items()
        },
        **{key: list(each) if isinstance(each, tuple) else each for key, each in options.items()},
        "held-out rows": None if held_out is None else held_out.samples.shape[1],
        "loss weights": None if weights is None else weights.tolist(),
        "shape": list(path.samples.shape),
        "timesteps": path.timesteps.tolist(),
        "trajectories": some_numbers(path),
        "trajectories held out": None if held_out is None else some_numbers(held_out),
        "weights": digest(_numbers(denoiser)),
    }


def _numbers(denoiser: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield by name what a denoiser computes with; weights of trainable layers are rounded.

    Behind a branch a weight depends on the order of sums, but not what it is rounded to.
    """
    layers = trainable_layers(denoiser)
    for name, value in denoiser.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        rounded = isinstance(layer, TrainableLayer) and name.endswith(".weight")
        yield name, layer.quantized_weight() if layer is not None and rounded else value


@torch.no_grad()
def some_numbers(path: Trajectories) -> list[float]:
    """Return some numbers of each row's prediction at the last step, spread over the row."""
    last = path.predictions[-1].flatten(1)
    rows = torch.linspace(0, len(last) - 1, min(ROWS, len(last))).round().long()
    columns = torch.linspace(0, last.shape[1] - 1, min(VALUES, last.shape[1])).round().long()
    numbers: list[float] = last[rows.to(last.device)][:, columns.to(last.device)].flatten().tolist()
    return numbers
