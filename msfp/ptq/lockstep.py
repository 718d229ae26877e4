"""Forward passes that wait for each other at each quantized layer.

Where samples cannot be put into one batch, each recorded forward runs twice in a thread of its own:
in full precision, and quantized. All stop at the first run of a layer. The layer is then visited
with the inputs and outputs of all of them, and the forwards continue to the next layer. One thread
runs at a time, so that results do not depend on their order.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from msfp.layers.kinds import kind_of
from msfp.layers.trainable import TrainableLayer

VisitAll = Callable[[str, TrainableLayer, list[torch.Tensor], list[torch.Tensor]], None]
"""Called with a layer, its quantized inputs and its full-precision outputs, by forward."""


class _Stopped(BaseException):
    """Ends a thread whose forward is not needed any more."""


class _Runner:
    """A forward in a thread that stops at layers.

    Args:
        forward: The forward; its result is kept.
        full: Whether its layers compute in full precision.

    Attributes:
        layer: Name of the layer at which it waits; None if it has ended.
        input: Input of that layer.
        output: Full-precision output of that layer, if `full`.
    """

    def __init__(self, forward: Callable[[], torch.Tensor], full: bool) -> None:
        self.full = full
        self.layer: str | None = None
        self.input = self.output = torch.empty(0)
        self.result: torch.Tensor | None = None
        self.error: BaseException | None = None
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

    def stop_at(self, layer: str, x: torch.Tensor, output: torch.Tensor) -> None:
        """Wait at a layer; called by the thread."""
        self.layer, self.input, self.output = layer, x, output
        self._stopped.release()
        self._go.acquire()
        self.input = self.output = torch.empty(0)
        if self._cancelled:
            raise _Stopped

    def cancel(self) -> None:
        """End the thread, wherever it waits."""
        if self._thread.is_alive():
            self._cancelled = True
            self._go.release()
            self._thread.join()


_current = threading.local()
"""The runner of this thread."""


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
        return layer.add_branch(x, layer.compute(x, self.weight, self.bias))

    def wanted(self, full: _Runner, quantized: _Runner) -> torch.Tensor:
        """Return the full-precision output that belongs to a quantized input.

        An expert may get other tokens in the quantized forward than in full precision. What it
        makes of its own tokens is then wanted.
        """
        if full.input.shape == quantized.input.shape:
            return full.output
        return self.full(quantized.input)


def run_in_lockstep(
    layers: dict[str, TrainableLayer],
    forwards: Sequence[Callable[[], torch.Tensor]],
    visit: VisitAll,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run forwards in full precision and quantized, and visit each layer with those that run it.

    Args:
        layers: The trainable layers, by name; visits may change them.
        forwards: Functions that run the denoiser.
        visit: Called once for each layer that runs.

    Returns:
        The results of the forwards in full precision, and of those that are quantized.
    """
    meetings = {name: _Meeting(name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.forward = meetings[name].forward  # type: ignore[method-assign]
    pairs = [(_Runner(each, full=True), _Runner(each, full=False)) for each in forwards]
    runners = [runner for pair in pairs for runner in pair]
    try:
        for runner in runners:
            runner.advance()
        while waiting := [runner for runner in runners if runner.layer is not None]:
            name = Counter(str(runner.layer) for runner in waiting).most_common(1)[0][0]
            _visit(meetings[name], [p for p in pairs if all(r.layer == name for r in p)], visit)
            for runner in waiting:
                if runner.layer == name:
                    runner.advance()
    finally:
        for runner in runners:
            runner.cancel()
        for layer in layers.values():
            del layer.forward
    results = [[_result(runner) for runner in column] for column in zip(*pairs, strict=True)]
    return results[0], results[1]


def _result(runner: _Runner) -> torch.Tensor:
    if runner.result is None:
        raise RuntimeError("a forward has not ended")
    return runner.result


def _visit(meeting: _Meeting, pairs: list[tuple[_Runner, _Runner]], visit: VisitAll) -> None:
    """Visit a layer with the pairs of forwards that wait at it."""
    meeting.visited = True
    inputs = [quantized.input for _, quantized in pairs]
    outputs = [meeting.wanted(full, quantized) for full, quantized in pairs]
    if pairs:
        visit(meeting.name, meeting.layer, inputs, outputs)


def one_batch(
    layer: TrainableLayer, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return inputs and outputs of several forwards as those of one batch, or None.

    The tokens of linear layers are put together whatever their number. Convolutions take the inputs
    of the commonest size.
    """
    places = getattr(kind_of(layer), "places", 0)
    if not places:
        rows = [x.reshape(-1, x.shape[-1]) for x in inputs]
        given = [y.reshape(-1, y.shape[-1]) for y in outputs]
        return torch.cat(rows), torch.cat(given)
    pairs = [(x, y) for x, y in zip(inputs, outputs, strict=True) if x.dim() == places + 2]
    if not pairs:
        return None
    sizes: Counter[Any] = Counter(tuple(x.shape[1:]) for x, _ in pairs)
    size = sizes.most_common(1)[0][0]
    chosen = [(x, y) for x, y in pairs if tuple(x.shape[1:]) == size]
    return torch.cat([x for x, _ in chosen]), torch.cat([y for _, y in chosen])
