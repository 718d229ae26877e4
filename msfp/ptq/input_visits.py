"""What layers read in full precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from msfp.layers.trainable import TrainableLayer, full_precision
from msfp.pipelines.trajectories import Trajectories
from msfp.ptq.side_by_side import forwards_of
from msfp.support.hooks import hooked

Look = Callable[[str, torch.Tensor], None]
"""A function of the name of a layer and an input of it."""


@torch.no_grad()
def look_at_inputs(
    denoiser: nn.Module,
    layers: Mapping[str, TrainableLayer],
    trajectories: Trajectories,
    sample: tuple[torch.Tensor, torch.Tensor],
    batch: int | None,
    note: Look,
) -> None:
    """Call a function with the full-precision inputs of layers, in float32.

    Args:
        denoiser: Quantized and trainable.
        layers: The layers by name.
        trajectories: Recorded from the full-precision denoiser.
        sample: Steps and rows of the samples to use.
        batch: Largest number of samples in one forward, or None for the default.
        note: The function. It is not called for inputs without numbers.
    """

    def hook(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
            x = args[0] if args else kwargs["input"]
            assert isinstance(x, torch.Tensor)  # noqa: S101 - as a layer needs it
            if x.numel():
                note(name, x.detach().float())

        return see

    step, row = sample
    hooks = [
        each.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, each in layers.items()
    ]
    with hooked(hooks), full_precision(denoiser):
        for part in forwards_of(trajectories, step, batch):
            trajectories.predict(denoiser, step[part], row[part])
