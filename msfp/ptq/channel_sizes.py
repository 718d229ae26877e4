"""How large the channels of inputs are, by which low-rank branches weigh the columns of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from msfp.layers.trainable import TrainableLayer
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.ptq.input_visits import look_at_inputs

SAMPLES = 32
"""Most samples whose inputs are read."""


def channel_sizes(
    denoiser: nn.Module,
    layers: Mapping[str, TrainableLayer],
    trajectories: Trajectories,
    *,
    samples: int,
    batch: int | None,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the root mean square of each input channel in full precision, by layer.

    Args:
        denoiser: Quantized and trainable.
        layers: The layers whose inputs are read.
        trajectories: Recorded from the full-precision denoiser.
        samples: Largest number of noisy samples to use, spread evenly over the timesteps.
        batch: Largest number of samples in one forward, as for `RefinementConfig`.
        seed: Seed of the draws.

    Returns:
        Float32, shape (channels,), for each layer that runs with finite inputs.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()

    def note(name: str, x: torch.Tensor) -> None:
        rows = x.movedim(layers[name].kind.channel_axis(x), -1).flatten(0, -2)
        sums[name] = sums.get(name, 0) + rows.double().square().sum(0)
        counts[name] += len(rows)

    steps, rows = trajectories.samples.shape[:2]
    sample = spread_batch(steps, rows, samples, torch.Generator().manual_seed(seed))
    look_at_inputs(denoiser, layers, trajectories, sample, batch, note)
    return {
        name: (total / counts[name]).sqrt().float()
        for name, total in sums.items()
        if total.isfinite().all()
    }


def column_weights(layer: TrainableLayer, sizes: torch.Tensor | None) -> torch.Tensor | None:
    """Return weights of the columns of a layer's matrix in the SVD of its branch, or None.

    The rounding errors of an input are about equally large in all its channels. What is left of the
    weight should therefore be small in every column. Rounding errors of the weight count more in
    channels that are large. The squared weight of a column is the sum of both: 1, and the mean
    square of its channel, relative to the mean over channels.

    Args:
        layer: The layer.
        sizes: The root mean square of each channel, or None.

    Returns:
        Float32, shape (columns,). None weighs all columns equally.
    """
    if sizes is None or len(sizes) != layer.weight.shape[1]:  # in groups, rows read other channels
        return None
    squares = sizes.double().square()
    mean = squares.mean()
    if not mean > 0:
        return None
    weights = (1 + squares / mean).sqrt().float()
    return weights.repeat_interleave(layer.weight[0, 0].numel())
