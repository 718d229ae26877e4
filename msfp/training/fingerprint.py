"""The fingerprint of a training run: values that must be equal for it to resume, as JSON types.

Contents of files, such as weights and codes, are compared by a digest. Trajectories are recorded
again when a run resumes, perhaps by other kernels. Some of their numbers are compared, which may
differ by rounding.
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
"""The most rows of trajectories that are compared, and numbers of each row."""


def run_fingerprint(
    denoiser: nn.Module,
    path: Trajectories,
    config: FinetuneConfig,
    weights: torch.Tensor | None = None,
    held_out: Trajectories | None = None,
) -> dict[str, Any]:
    """Return the values that must be equal for a run to resume, as plain JSON types.

    Args:
        denoiser: A quantized and trainable denoiser, before it has hubs.
        path: Trajectories to train on.
        config: What is trained and how.
        weights: The loss weight of each timestep.
        held_out: Trajectories to measure errors on, or None.
    """
    options = config.to_dict()
    del options["shard"]  # does not change the result
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
    """Yield the parameters of a denoiser by name; weights of trainable layers are rounded.

    With a low-rank branch, a weight depends on the order of sums. Its rounded value does not.
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
