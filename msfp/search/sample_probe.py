"""Finding the layers whose input depends on the denoiser's noisy sample."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from msfp.support.trees import mapped, tensors_in

CHANGE = 0.125
"""Size of the change of the sample, relative to its standard deviation."""


class SampleProbe:
    """Compares the inputs of layers in a forward with those of the same forward of another sample.

    Attributes:
        done: Whether the second forward has run.
    """

    def __init__(self) -> None:
        self.done = False
        self._first: dict[str, list[tuple[float, ...]]] = {}
        self._runs: dict[str, int] = {}
        self._changed: dict[str, None] | None = None

    def note(self, name: str, x: torch.Tensor) -> bool:
        """Note the input of a layer; return whether this is the second forward."""
        if self._changed is not None:
            run = self._runs[name] = self._runs.get(name, -1) + 1
            if self._first.get(name, [])[run : run + 1] != [_digest(x)]:
                self._changed[name] = None
            return True
        if not self.done:
            self._first.setdefault(name, []).append(_digest(x))
        return False

    @torch.no_grad()
    def found(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[str]:
        """Run the forward with another sample; return the layers that its change reaches.

        The list is empty if the sample has no floating-point numbers, or the forward does not run a
        second time.
        """
        self.done, self._changed = True, {}
        given, named = mapped((args, kwargs), lambda x: x.detach().clone())
        bound = inspect.signature(denoiser.forward).bind(*given, **named).arguments
        parts = [x for x in tensors_in(_sample(bound, output)) if x.is_floating_point()]
        for part in parts:
            part += CHANGE * _spread(part)
        try:
            with torch.random.fork_rng(devices=[]):
                if parts:
                    denoiser.forward(*given, **named)
        except Exception:
            self._changed = {}
        changed, self._changed = list(self._changed), None
        return changed


def _sample(arguments: dict[str, Any], output: Any) -> Any:
    """Return the argument with the shape of the prediction, or else the first one."""
    shape = next((x.shape for x in tensors_in(output)), None)
    alike = (x for x in arguments.values() if isinstance(x, torch.Tensor) and x.shape == shape)
    return next(alike, next(iter(arguments.values()), None))


def _digest(x: torch.Tensor) -> tuple[float, ...]:
    """Return numbers that differ for different tensors."""
    wide = x.detach().double()
    return (wide.sum().item(), wide.square().sum().item(), float(x.numel()))


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Return numbers with alternating signs, of the size of a tensor's standard deviation."""
    signs = torch.arange(x.numel(), device=x.device).remainder(3).sub(1).view(x.shape)
    size = x.double().square().mean().sqrt().clamp(min=1e-3).to(x.dtype)
    return signs.to(x.dtype) * size
