"""Finding the layers on the path of the denoiser's noisy sample, and those at its ends."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from msfp.support.hooks import hooked
from msfp.support.trees import mapped, tensors_in

CHANGE = 0.125
"""Size of the change of the sample, relative to its standard deviation."""
SAME = 1e-7
"""Largest relative difference of the sums of two tensors of the same numbers."""
Digest = tuple[float, float, float]
"""Sum, sum of squares and number of elements, whatever their order."""


class SamplePath(NamedTuple):
    """The layers that the sample reaches.

    Attributes:
        layers: Those whose input changes with the sample, in the order in which they run.
        readers: Those that read a sample itself: the first one that each sample reaches, and each
            whose input has the numbers of a sample, in any order.
        writers: Those whose output has the numbers of a prediction, in any order; the last one if
            there are none.
    """

    layers: list[str]
    readers: list[str]
    writers: list[str]


class SampleProbe:
    """Compares the inputs of layers in a forward with those of the same forward of another sample.

    Attributes:
        done: Whether the second forward has run.
    """

    def __init__(self) -> None:
        self.done = False
        self._first: dict[str, list[Digest]] = {}
        self._runs: dict[str, int] = {}
        self._changed: dict[str, Digest] | None = None
        self._written: dict[str, Digest] = {}

    def note(self, name: str, x: torch.Tensor) -> bool:
        """Note the input of a layer; return whether this is the second forward."""
        if self._changed is not None:
            run = self._runs[name] = self._runs.get(name, -1) + 1
            digest = _digest(x)
            if self._first.get(name, [])[run : run + 1] != [digest]:
                self._changed.setdefault(name, digest)
            return True
        if not self.done:
            self._first.setdefault(name, []).append(_digest(x))
        return False

    @torch.no_grad()
    def found(
        self,
        denoiser: nn.Module,
        layers: Mapping[str, nn.Module],
        call: tuple[tuple[Any, ...], dict[str, Any]],
        output: Any,
    ) -> SamplePath:
        """Run the forward with other samples, all and each alone; return what their change reaches.

        These are none if the samples have no floating-point numbers, or the forward does not run a
        second time.

        Args:
            denoiser: The network.
            layers: Its layers by name; `note` must be called with the input of each.
            call: The arguments of the first forward.
            output: What it returned.
        """
        self.done = True
        bound = inspect.signature(denoiser.forward).bind(*call[0], **call[1]).arguments
        places = [i for i, x in enumerate(_samples(bound, output)) if x.is_floating_point()]
        given, predictions, changed = self._run(denoiser, layers, call, places, output)
        path = list(changed)
        readers = {name for name in path if _is_among(changed[name], given)} | {*path[:1]}
        for place in places if len(places) > 1 else ():
            readers |= {*list(self._run(denoiser, {}, call, [place], output)[2])[:1]}
        writers = [name for name in path if _is_among(self._written.get(name), predictions)]
        in_order = [name for name in path if name in readers]
        return SamplePath(path, in_order, writers or path[-1:])

    def _run(
        self,
        denoiser: nn.Module,
        layers: Mapping[str, nn.Module],
        call: tuple[tuple[Any, ...], dict[str, Any]],
        places: list[int],
        output: Any,
    ) -> tuple[list[Digest], list[Digest], dict[str, Digest]]:
        """Run the forward with some samples changed.

        Args:
            denoiser: The network.
            layers: The layers whose outputs are noted.
            call: The arguments of the first forward.
            places: Which samples to change.
            output: What the first forward returned.

        Returns:
            Digests of the changed samples and of the predictions, and those of the inputs of the
            layers that the change reaches; all empty if the forward cannot run.
        """
        self._changed, self._runs = {}, {}
        args, kwargs = mapped(call, lambda x: x.detach().clone())
        samples = _samples(
            inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments, output
        )
        for place in places:
            samples[place] += CHANGE * _spread(samples[place])
        given = [_digest(samples[place]) for place in places]
        predictions: list[Digest] = []
        try:
            with torch.random.fork_rng(devices=[]), hooked(self._writing(layers)):
                if places:
                    result = denoiser.forward(*args, **kwargs)
                    predictions = [_digest(x) for x in tensors_in(result)]
        except Exception:
            self._changed = {}
        changed, self._changed = self._changed, None
        return given, predictions, changed

    def _writing(self, layers: Mapping[str, nn.Module]) -> list[Any]:
        """Install hooks that note the outputs of layers."""

        def noting(name: str) -> Any:
            def note(_layer: nn.Module, _args: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor):
                    self._written[name] = _digest(output)

            return note

        return [layer.register_forward_hook(noting(name)) for name, layer in layers.items()]


def _samples(arguments: dict[str, Any], output: Any) -> list[torch.Tensor]:
    """Return the arguments with the shape of a prediction; the first one for other predictions."""
    shapes = [x.shape for x in tensors_in(output)]
    given = (x for x in arguments.values() if isinstance(x, torch.Tensor))
    alike = [x for x in given if x.dim() > 1 and x.shape in shapes]
    if {*shapes} <= {x.shape for x in alike}:
        return alike
    first = tensors_in(next(iter(arguments.values()), None))
    return alike + [x for x in first if not any(x is other for other in alike)]


def _digest(x: torch.Tensor) -> Digest:
    """Return numbers that differ for different tensors."""
    wide = x.detach().double()
    return (wide.sum().item(), wide.square().sum().item(), float(x.numel()))


def _is_among(digest: Digest | None, others: Iterable[Digest]) -> bool:
    """Return whether a tensor has the numbers of one of several others."""
    return digest is not None and any(_is_same(digest, other) for other in others)


def _is_same(one: Digest, other: Digest) -> bool:
    total, energy, size = one
    close = abs(energy - other[1]) <= SAME * energy
    return size == other[2] and close and abs(total - other[0]) <= SAME * (energy * size) ** 0.5


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Return numbers with alternating signs, of the size of a tensor's standard deviation."""
    signs = torch.arange(x.numel(), device=x.device).remainder(3).sub(1).view(x.shape)
    size = x.double().square().mean().sqrt().clamp(min=1e-3).to(x.dtype)
    return signs.to(x.dtype) * size
