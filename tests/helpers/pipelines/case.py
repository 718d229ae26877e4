"""What a small pipeline is: how it is built, and the arguments of one call of it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn


@dataclass(frozen=True)
class PipelineCase:
    """A small pipeline of random weights, and one call of it.

    Attributes:
        kind: What the pipeline does, such as "text to image".
        build: A function that returns the pipeline.
        arguments: A function that returns the keyword arguments of one call, without those that
            `call` adds.
        denoisers: Names of the components that predict noise.
        saved: Whether diffusers loads the same pipeline from the folder that it saved it to.
        reason: Why the pipeline cannot be built, as one sentence; empty if it can.
    """

    kind: str
    build: Callable[[], DiffusionPipeline]
    arguments: Callable[[], dict[str, Any]]
    denoisers: tuple[str, ...] = ("unet",)
    saved: bool = True
    reason: str = ""

    def make(self) -> DiffusionPipeline:
        """Return the pipeline, in evaluation. None of the weights of its denoisers is zero."""
        torch.manual_seed(0)
        pipe = self.build()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval()
        for name in self.denoisers:
            fill(getattr(pipe, name))
        quiet(pipe)
        return pipe

    def call(self, pipe: DiffusionPipeline, **changes: Any) -> torch.Tensor:
        """Return what a call of the pipeline gives, always from the same noise.

        Args:
            pipe: What `make` returned, or a copy of it.
            changes: Arguments to add to those of the case, or to replace.
        """
        taken = inspect.signature(pipe.__call__).parameters
        added: dict[str, Any] = {}
        if "generator" in taken:
            added["generator"] = torch.Generator().manual_seed(0)
        if "output_type" in taken:
            added["output_type"] = "np"
        quiet(pipe)
        torch.manual_seed(0)  # for what a pipeline draws without its generator
        with torch.no_grad():
            return stacked(pipe(**{**added, **self.arguments(), **changes})[0])


def quiet(pipe: DiffusionPipeline) -> None:
    """Turn off the progress bars of a pipeline, and of the pipelines it is made of."""
    for each in (pipe, *(v for v in vars(pipe).values() if isinstance(v, DiffusionPipeline))):
        each.set_progress_bar_config(disable=True)


def fill(denoiser: nn.Module, std: float = 0.1) -> None:
    """Give random values to the parameters of a denoiser that are zero, or as good as zero.

    Würstchen scales some weights down again and again when it is made, to nothing.
    """
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.is_floating_point() and parameter.abs().max() < 1e-6:
                parameter.normal_(std=std)


def stacked(output: Any) -> torch.Tensor:
    """Return images, frames or audio of a pipeline as one tensor of floating point."""
    if isinstance(output, list | tuple):
        return torch.stack([stacked(each) for each in output])
    if isinstance(output, torch.Tensor):
        return output.float()
    return torch.from_numpy(np.asarray(output)).float()
