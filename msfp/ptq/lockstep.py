"""Forward passes that wait for each other at each quantized layer.

Each forward runs twice in a thread of its own: in full precision, and quantized. All stop at the
first run of a layer. The layer is then visited with the inputs and outputs of all of them, and the
forwards continue to the next layer. One thread runs at a time, so that results do not depend on
their order. What a waiting forward has in memory can be put into files.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from msfp.layers.kinds import kind_of
from msfp.layers.trainable import TrainableLayer
from msfp.support.frames import tensors_of
from msfp.support.hooks import hooked
from msfp.support.paging import PageFolder
from msfp.support.trees import tensors_in


class _Stopped(BaseException):
    """Ends a thread whose forward is not needed any more."""


class _Runner:
    """A forward in a thread that stops at layers.

    Args:
        forward: The forward; its result is kept.
        full: Whether its layers compute in full precision.
        pages: Where its tensors go while it waits; None keeps them in memory.

    Attributes:
        layer: Name of the layer at which it waits; None if it has ended.
        input: Input of that layer.
        output: Full-precision output of that layer, if `full`.
    """

    def __init__(
        self, forward: Callable[[], torch.Tensor], full: bool, pages: PageFolder | None
    ) -> None:
        self.full, self.pages = full, pages
        self.layer: str | None = None
        self.input = self.output = torch.empty(0)
        self.result: torch.Tensor | None = None
        self.error: BaseException | None = None
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, args=(forward,), daemon=True)
        self._thread.start()

    def _run(self, forward: Callable[[], torch.Tensor]) -> None:
        self._go.acquire()
        _current.runner = self
        try:
            if not self._cancelled:
                with torch.no_grad():
                    self.result = forward()
        except BaseException as error:
            self.error = error
        self.layer = None
        self._stopped.release()

    def advance(self) -> None:
        """Run until the next stop, or to the end; raise the error of the forward."""
        self._go.release()
        self._stopped.acquire()
        if self.error is not None and not isinstance(self.error, _Stopped):
            raise self.error
        self.put_away()

    def stop_at(self, layer: str, x: torch.Tensor, output: torch.Tensor) -> None:
        """Wait at a layer; called by the thread."""
        self.layer, self.input, self.output = layer, x, output
        self.see((x, output))
        del x, output
        self._stopped.release()
        self._go.acquire()
        self.input = self.output = torch.empty(0)
        if self._cancelled:
            raise _Stopped

    def see(self, tree: Any) -> None:
        """Remember the tensors of a tree, which may stay in memory while the forward waits."""
        if self.pages is not None:
            self._seen += [weakref.ref(x) for x in tensors_in(tree)]

    def put_away(self) -> None:
        """Take the tensors of the forward out of memory, if there is a folder for them."""
        if self.pages is None:
            return
        seen = {id(x): x for each in self._seen if (x := each()) is not None}
        self._seen = [weakref.ref(x) for x in seen.values()]
        # Those of one memory go together, such as queries that are a view of a layer's output.
        together: dict[int, dict[int, torch.Tensor]] = {}
        for x in (*seen.values(), *tensors_of(self._thread)):
            for each in (x, x._base):
                if each is not None and each.layout is torch.strided:
                    memory = each.untyped_storage()._cdata
                    together.setdefault(memory, {})[id(each)] = each
        for tensors in together.values():
            self.pages.put_away(*tensors.values())

    def cancel(self) -> None:
        """End the thread, wherever it waits."""
        if self._thread.is_alive():
            self._cancelled = True
            self._go.release()
            self._thread.join()


_current = threading.local()
"""The runner of this thread."""


def _see_inputs(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    runner: _Runner | None = getattr(_current, "runner", None)
    if runner is not None:
        runner.see((args, kwargs))


def _see_outputs(_module: nn.Module, _args: Any, output: Any) -> None:
    runner: _Runner | None = getattr(_current, "runner", None)
    if runner is not None:
        runner.see(output)


class _Meeting:
    """A layer at which forwards stop the first time that they run it."""

    def __init__(self, name: str, layer: TrainableLayer) -> None:
        self.name, self.layer = name, layer
        self.weight, self.bias = layer.weight, layer.bias
        self.visited = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in torch
        """Compute the layer; this replaces its forward method."""
        runner: _Runner | None = getattr(_current, "runner", None)
        layer = self.layer
        if runner is not None and runner.full:
            output = self.full(input)
            if not self.visited:
                runner.stop_at(self.name, input, output)
            return output
        if runner is not None and not self.visited:
            runner.stop_at(self.name, input, torch.empty(0))
        return type(layer).forward(layer, input)

    def full(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer in full precision."""
        layer = self.layer
        bias = None if self.bias is None else self.bias.to(x.device)
        output = layer.in_full_precision(x, self.weight.to(x.device), bias)
        # As outputs of the quantized half lie in memory, so that later sums have the same order.
        return layer.kind.channels_last(output)


class _Pair:
    """The full-precision and the quantized run of a forward."""

    def __init__(self, forward: Callable[[], torch.Tensor], pages: PageFolder | None) -> None:
        self.full = _Runner(forward, full=True, pages=pages)
        self.quantized = _Runner(forward, full=False, pages=pages)

    @property
    def runners(self) -> tuple[_Runner, _Runner]:
        """Both runs."""
        return self.full, self.quantized

    def wait_at(self, name: str) -> bool:
        """Return whether both runs wait at a layer."""
        return self.full.layer == self.quantized.layer == name

    def part(self, meeting: _Meeting) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the quantized input of a layer, and the full-precision output that belongs to it.

        An expert may get other tokens in the quantized forward than in full precision. What it
        makes of its own tokens is then wanted.
        """
        x, output = self.quantized.input, self.full.output
        if self.full.input.shape != x.shape:
            output = meeting.full(x)
        if x.dim() == kind_of(meeting.layer).places + 1:
            x, output = x.unsqueeze(0), output.unsqueeze(0)
        return x, output


@dataclass(frozen=True)
class Visit:
    """A layer after its full-precision runs and before its quantized runs.

    Attributes:
        name: Dotted name of the layer in the denoiser.
        layer: The trainable layer; its weight and bias are still those of full precision.
        rows: Length of the first axis of its inputs, in all forwards.
    """

    name: str
    layer: TrainableLayer
    rows: int
    _meeting: _Meeting
    _pairs: Sequence[_Pair]

    def parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what the layer reads and should return in each forward.

        These are its inputs from quantized predecessors, before its input quantizer, and its
        full-precision outputs, bias and low-rank branch included.
        """
        for pair in self._pairs:
            x, output = pair.part(self._meeting)
            if output.numel():  # an expert may get no tokens
                yield x, output
            for runner in pair.runners:
                runner.put_away()


Visitor = Callable[[Visit], None]


def run_in_lockstep(
    denoiser: nn.Module,
    layers: dict[str, TrainableLayer],
    forwards: Sequence[Callable[[], torch.Tensor]],
    visitor: Visitor,
    pages: PageFolder | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run forwards in full precision and quantized, and visit each layer with those that run it.

    Args:
        denoiser: The network with the layers.
        layers: The trainable layers, by name; visits may change them.
        forwards: Functions that run the denoiser.
        visitor: Called once for each layer that runs.
        pages: Where the tensors of waiting forwards go, and weights after their layer was visited;
            None keeps them in memory.

    Returns:
        The results of the forwards in full precision, and of those that are quantized.
    """
    meetings = {name: _Meeting(name, layer) for name, layer in layers.items()}
    modules = [] if pages is None else list(denoiser.modules())
    pairs: list[_Pair] = []
    runners: list[_Runner] = []
    try:
        for name, layer in layers.items():
            # Set on the instance, where nn.Module looks first. The class keeps its own method.
            layer.forward = meetings[name].forward  # type: ignore[method-assign]
        for each in forwards:
            pairs.append(_Pair(each, pages))
            runners += pairs[-1].runners
        with hooked(
            hook
            for each in modules
            for hook in (
                each.register_forward_pre_hook(_see_inputs, with_kwargs=True),
                each.register_forward_hook(_see_outputs),
            )
        ):
            for runner in runners:
                runner.advance()
            while waiting := [runner for runner in runners if runner.layer is not None]:
                name = Counter(str(runner.layer) for runner in waiting).most_common(1)[0][0]
                _visit(meetings[name], [pair for pair in pairs if pair.wait_at(name)], visitor)
                for runner in waiting:
                    if runner.layer == name:
                        runner.advance()
                if pages is not None:
                    for weight in (meetings[name].weight, layers[name].weight):
                        pages.put_away(weight)
    finally:
        for runner in runners:
            runner.cancel()
        for layer in layers.values():
            vars(layer).pop("forward", None)
    return [_result(pair.full) for pair in pairs], [_result(pair.quantized) for pair in pairs]


def _visit(meeting: _Meeting, pairs: list[_Pair], visitor: Visitor) -> None:
    """Visit a layer with the pairs of runs that wait at it."""
    meeting.visited = True
    read = (pair.quantized.input for pair in pairs)
    rows = sum(len(x) if x.dim() > 1 else 1 for x in read if x.numel())
    if rows:
        visitor(Visit(meeting.name, meeting.layer, rows, meeting, pairs))


def _result(runner: _Runner) -> torch.Tensor:
    if runner.result is None:
        raise RuntimeError("a forward has not ended")
    return runner.result
