"""What a quantization will take, before it starts: layers, size, time, memory and disk.

One forward of the denoiser is measured. Each stage is then estimated from its arithmetic, and from
rates that are measured on this machine within seconds.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.config import MAX_BITS, LayerSettings, QuantizationConfig, RefinementConfig
from msfp.layers.adapters import merged_adapters
from msfp.layers.block_quantizer import BlockQuantizer
from msfp.layers.formats import BlockFormats
from msfp.layers.kinds import PlainLayer
from msfp.layers.lora.low_rank import low_rank
from msfp.layers.selection import quantizable_layers, settings_by_layer
from msfp.pipelines.denoiser import denoiser_of, denoisers_of
from msfp.pipelines.sampler import PipelineCall, check_calls
from msfp.ptq.bit_allocation import budget_bytes, check_budget, rank_of
from msfp.ptq.refinement import MOST_COLUMNS, default_samples
from msfp.ptq.request import refinement_of
from msfp.ptq.sensitivity import RANKS, ROWS, SAMPLES, WIDTHS
from msfp.ptq.space import (
    FACTORS,
    FLOAT,
    KEPT,
    PAGED,
    SEARCHED,
    moment_bytes,
    shape_of,
    widest_bytes,
)
from msfp.ptq.stored_size import FACTOR, layer_bytes
from msfp.search.calibration import Calibration
from msfp.search.layer_search import grid_of_branch, search_input, search_weight
from msfp.search.observers import calibrate
from msfp.search.schemes import SCHEMES, BlockScheme
from msfp.support.checks import check_truth, check_type
from msfp.support.hooks import hooked
from msfp.support.memory import forget_peak, peak_bytes, resident_bytes
from msfp.support.offloading import with_weights
from msfp.support.progress import no_progress
from msfp.support.trees import tensors_in

SIDE = 1024
"""Rows and columns of the matrices whose product is timed."""
TRIED = 2**20
"""The fewest weights of the layer that is searched to measure the time, if one has as many."""
FORWARDS = 3
"""Forwards of a refined sample: one in full precision, and a quantized one that rounds weights."""
BACKWARD = 4
"""Forwards that the forward and backward of a measured sample take."""
FACTORED = 0.5
"""Operations for each cube of columns: a Cholesky factorisation, which is slower than a product."""
PRODUCTS = 3
"""Products of a row of the matrix with the moments: residual, matching, rounding."""


class Stage(NamedTuple):
    """A stage of a quantization.

    Attributes:
        name: What is done.
        seconds: Estimated time.
        memory: Estimated peak memory of the process in bytes; None if memory is unknown here.
    """

    name: str
    seconds: float
    memory: int | None


class Group(NamedTuple):
    """Layers with the same settings.

    Attributes:
        bits: As "W4A4".
        layers: Number of layers.
        weights: Number of their weights.
        weight_formats: Formats that are searched for the weights.
        input_formats: Formats that are searched for the inputs.
    """

    bits: str
    layers: int
    weights: int
    weight_formats: tuple[str, ...]
    input_formats: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """What a quantization will take.

    Attributes:
        groups: The layers that are quantized.
        full_precision: Number of parameters that stay in full precision.
        before: Bytes of the parameters of the denoiser.
        after: Bytes of the quantized denoiser in its file.
        stages: The stages, in their order.
        disk: Bytes on disk while it runs: the state folder, and with offloading the pages.
    """

    groups: tuple[Group, ...]
    full_precision: int
    before: int
    after: int
    stages: tuple[Stage, ...]
    disk: int

    @property
    def seconds(self) -> float:
        """The time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory(self) -> int | None:
        """The largest peak of a stage; None if memory is unknown here."""
        known = [stage.memory for stage in self.stages if stage.memory is not None]
        return max(known, default=None)


@with_weights(denoisers_of)
def estimate(
    model: DiffusionPipeline | nn.Module,
    config: QuantizationConfig | None = None,
    *,
    calls: PipelineCall | Sequence[PipelineCall],
    offload: bool = False,
) -> Estimate:
    """Return what `quantize` will take for a denoiser, without changing it.

    One call is made. Its first forward is computed, and repeated as calibration does; the later
    ones return what the first one returned. One layer is searched and gets a branch, and a product
    of matrices is computed, to measure their times. Products of attention that `attention_bits`
    quantizes are not counted.

    Args:
        model: A pipeline with one denoiser, or the denoiser, in full precision.
        config: As for `quantize`.
        calls: As for `quantize`; the first is made.
        offload: As for `quantize`.

    Raises:
        InputError: As `quantize` does, for what can be known before it starts.

    Example:
        >>> import msfp
        >>> calls = msfp.Sampler(steps=10, batch=4).calls(8, seed=0)
        >>> found = estimate(msfp.reference_pipeline(), calls=calls)
        >>> [group.layers for group in found.groups], found.after < found.before / 3
        ([63, 2], True)
    """
    config = QuantizationConfig() if config is None else config
    check_type("config", config, QuantizationConfig)
    check_truth("offload", offload)
    calls, denoiser = check_calls("calls", calls), denoiser_of(model)
    with merged_adapters(denoiser):
        plain = quantizable_layers(denoiser)
        refinement = refinement_of(
            denoiser, config, settings_by_layer(denoiser, config, plain), recordable=True
        )
        call = measured_call(model, calls[0])
        seen = call.calibration
        settings = settings_by_layer(denoiser, config, seen.ran, seen.readers, seen.writers)
        layers = {name: plain[name] for name in settings}
        rank = 0 if refinement is None else refinement.branch_rank
        if config.budget is not None:
            check_budget(denoiser, config, settings, rank)
        cost = _Cost(
            denoiser, layers, settings, rank, config.budget, call, len(calls), offload=offload
        )
        return Estimate(
            tuple(_groups(layers, settings)),
            sum(p.numel() for p in denoiser.parameters())
            - sum(layer.weight.numel() for layer in layers.values()),
            _bytes(denoiser.parameters()),
            cost.size(),
            tuple(cost.stages(refinement)),
            cost.disk(refined=refinement is not None),
        )


def _groups(layers: dict[str, PlainLayer], settings: dict[str, LayerSettings]) -> Iterator[Group]:
    """Yield the layers by their settings, the most first."""
    names: dict[LayerSettings, list[str]] = {}
    for name, each in settings.items():
        names.setdefault(each, []).append(name)
    for each, own in sorted(names.items(), key=lambda item: -len(item[1])):
        weights = sum(layers[name].weight.numel() for name in own)
        inputs = each.activation_bits
        bits = f"W{each.weight_bits}" + ("" if inputs is None else f"A{inputs}")
        formats = _formats(each, each.weight_bits, of_weights=True)
        yield Group(bits, len(own), weights, formats, _formats(each, inputs, of_weights=False))


def _formats(settings: LayerSettings, bits: int | None, *, of_weights: bool) -> tuple[str, ...]:
    """Return the names of the formats that are searched."""
    scheme = SCHEMES[settings.scheme]
    if bits is None:
        return ()
    if isinstance(scheme, BlockScheme):
        return (scheme.formats[bits],)
    signs = (True,) if of_weights or not scheme.unsigned else (True, False)
    return tuple(str(fmt) for sign in signs for fmt in scheme.formats(bits, signed=sign))


class MeasuredCall(NamedTuple):
    """A call of a pipeline in which the denoiser ran once.

    Attributes:
        calibration: What the calibration of this call saw.
        forward: Seconds of the forward, with calibration.
        rest: Seconds of the rest of the call.
        forwards: Number of forwards in the call.
        rows: Samples in a forward.
        numbers: Numbers of a sample.
        recorded: Bytes of the arguments and outputs of a forward.
        peak: Peak memory of the process during the call, in bytes; None if unknown.
    """

    calibration: Calibration
    forward: float
    rest: float
    forwards: int
    rows: int
    numbers: int
    recorded: int
    peak: int | None


def measured_call(model: DiffusionPipeline | nn.Module, call: PipelineCall) -> MeasuredCall:
    """Make a call of a model, but compute only the first forward of its denoiser."""
    denoiser = denoiser_of(model)
    forget_peak()
    with _one_forward(denoiser) as ran:
        start = time.perf_counter()
        calibration = calibrate(model, calls=[call], progress=no_progress)
        whole = time.perf_counter() - start
    given = list(tensors_in((ran.given, ran.output)))
    first = next(tensors_in(ran.given))
    return MeasuredCall(
        calibration, ran.times[0], max(0.0, whole - sum(ran.times)), ran.calls, len(first),
        max(1, first[0].numel()), sum(x.numel() * x.element_size() for x in given), peak_bytes(),
    )  # fmt: skip


class _Forward:
    """Runs the forward of a network in its first call, and then returns copies of its output.

    Attributes:
        calls: Number of calls.
        times: Seconds of the forwards of the first call; calibration repeats the forward in it.
        given: The arguments of the first forward.
        output: What it returned.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward, self.calls = forward, 0
        self.times: list[float] = []
        self.given: Any = None
        self.output: Any = None
        self.__signature__ = inspect.signature(forward)

    def count(self, *_: Any) -> None:
        """Count a call, before its forward."""
        self.calls += 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls > 1:
            return copy.deepcopy(self.output)  # a sampler may change it
        start = time.perf_counter()
        with torch.no_grad():
            output = self.forward(*args, **kwargs)
        self.times.append(time.perf_counter() - start)
        if len(self.times) == 1:
            self.given, self.output = (args, kwargs), output
        return copy.deepcopy(output)


@contextmanager
def _one_forward(denoiser: nn.Module) -> Iterator[_Forward]:
    """Let a network compute only its first forward inside the block."""
    ran, own = _Forward(denoiser.forward), vars(denoiser).get("forward")
    denoiser.forward = ran
    try:
        with hooked([denoiser.register_forward_pre_hook(ran.count)]):
            yield ran
    finally:
        del denoiser.forward
        if own is not None:  # as of Accelerate's hooks
            denoiser.forward = own


class _Cost:
    """Estimates the stages of the quantization of one denoiser."""

    def __init__(
        self,
        denoiser: nn.Module,
        layers: dict[str, PlainLayer],
        settings: dict[str, LayerSettings],
        rank: int,
        budget: float | str | None,
        call: MeasuredCall,
        calls: int,
        *,
        offload: bool,
    ) -> None:
        self.denoiser, self.layers, self.settings = denoiser, layers, settings
        self.rank, self.budget = rank, budget
        self.call, self.calls, self.offload = call, calls, offload
        self.weights = _bytes(layer.weight for layer in layers.values())
        self.shapes = {name: shape_of(layer) for name, layer in layers.items()}

    def branched(self, name: str) -> bool:
        """Return whether a layer gets a low-rank branch."""
        return bool(rank_of(self.layers[name], self.settings[name], self.rank))

    def size(self) -> int:
        """Return the bytes of the quantized denoiser in its file."""
        total = _bytes(self.denoiser.parameters()) - self.weights
        if self.budget is not None:
            most = sum(layer_bytes(layer, max(WIDTHS), 0) for layer in self.layers.values())
            return total + int(min(most, budget_bytes(self.budget, self.denoiser, self.layers)))
        for name, layer in self.layers.items():
            each = self.settings[name]
            total += layer_bytes(layer, each.weight_bits, rank_of(layer, each, self.rank))
            if isinstance(SCHEMES[each.scheme], BlockScheme):
                blocks = BlockFormats(_formats(each, each.weight_bits, of_weights=True)[0])
                total += layer.weight.numel() // blocks.weight_blocks.size
        return total

    def stages(self, refinement: RefinementConfig | None) -> Iterator[Stage]:
        """Yield the stages in their order."""
        call, loaded = self.call, resident_bytes()
        search = self._search(refined=refinement is not None)
        layers = self.layers.values()
        searched = SEARCHED * widest_bytes(layers)
        recorded = self._recorded() if refinement is not None or self.budget is not None else 0

        def memory(more: float) -> int | None:
            return None if loaded is None else int(loaded + more)

        seconds = self.calls * (call.rest + call.forwards * call.forward)
        peak = None if call.peak is None else call.peak + recorded
        yield Stage("calls", seconds, peak)
        if self.budget is not None:
            yield Stage("budget", self._measurement(search), memory(recorded + self._factors()))
        yield Stage("search", search, memory(recorded + searched))
        if refinement is None:
            return
        kept = recorded + (0 if self.offload else self.weights)
        if self.rank:
            yield Stage(
                "branches",
                self._branches(search),
                memory(kept + searched),
            )
        forward = 2 * max(0, (call.peak or 0) - (loaded or 0)) + FACTORS * moment_bytes(
            self.layers.values()
        )
        yield Stage("refinement", self._refinement(refinement), memory(kept + forward))

    def disk(self, *, refined: bool) -> int:
        """Return the bytes on disk while it runs, and of the result."""
        if not refined:
            return self.size() + (0 if self.budget is None else self._recorded())
        copies = KEPT + (PAGED if self.offload else 0)
        return self.size() + self._recorded() + copies * self.weights

    def _recorded(self) -> int:
        return self.calls * self.call.forwards * self.call.recorded

    def _tried(self) -> str:
        """Return the name of the smallest layer that is large enough to measure its search."""
        sizes = {name: layer.weight.numel() for name, layer in self.layers.items()}
        ordered = sorted(sizes, key=sizes.__getitem__)
        return next((name for name in ordered if sizes[name] >= TRIED), ordered[-1])

    def _search(self, *, refined: bool) -> float:
        """Return the seconds of the search, from that of one layer."""
        name = self._tried()
        weight, settings = self.layers[name].weight.detach().float(), self.settings[name]
        numbers = sum(each.weight.numel() for each in self.layers.values())
        if isinstance(SCHEMES[settings.scheme], BlockScheme):
            if not refined:
                return 0.0
            blocks = _formats(settings, settings.weight_bits, of_weights=True)[0]
            seconds = _timed(lambda: BlockQuantizer.of(blocks, weight))
            return seconds * numbers / weight.numel()
        seconds = _timed(lambda: search_weight(weight, settings))
        return seconds * numbers / weight.numel() + self._input_search(name) * len(self.layers)

    def _input_search(self, name: str) -> float:
        """Return the seconds of the search for the input of a layer."""
        settings, inputs = self.settings[name], self.call.calibration.inputs[name]
        bits = settings.activation_bits
        if bits is None or not inputs.count:
            return 0.0
        seconds = _timed(lambda: search_input(inputs, bits, settings.scheme))
        return seconds + (_timed(lambda: grid_of_branch(inputs)) if bits < MAX_BITS else 0.0)

    def _branches(self, search: float) -> float:
        """Return the seconds of all low-rank branches, from that of one, and of a second search."""
        matrix = self.layers[self._tried()].weight.detach().float().flatten(1)
        seconds = _timed(lambda: low_rank(matrix, self.rank))
        names = [name for name in self.layers if self.branched(name)]
        total = sum(svd_cost(*self.layers[name].weight.flatten(1).shape) for name in names)
        share = sum(self.layers[name].weight.numel() for name in names) / max(
            1, self.weights // FLOAT
        )
        return seconds * total / svd_cost(*matrix.shape) + search * share

    def _measurement(self, search: float) -> float:
        """Return the seconds to measure what rounding each layer costs."""
        matrix = self.layers[self._tried()].weight.detach().float().flatten(1)
        seconds = _timed(lambda: low_rank(matrix, RANKS[-1])) / svd_cost(*matrix.shape)
        shapes = [layer.weight.flatten(1).shape for layer in self.layers.values()]
        rows = sum(min(ROWS, len(each.weight)) for each in self.layers.values())
        all_rows = sum(len(each.weight) for each in self.layers.values())
        samples = min(SAMPLES, self.calls * self.call.forwards * self.call.rows)
        return (
            seconds * sum(svd_cost(*shape) for shape in shapes)
            + search * len(WIDTHS) * rows / all_rows
            + BACKWARD * samples * self.call.forward / self.call.rows
        )

    def _factors(self) -> int:
        """Return the bytes of the factors of all layers, from which ranks are measured."""
        return sum(
            FACTOR * min(RANKS[-1], rows, columns) * (rows + columns)
            for _, rows, columns in self.shapes.values()
        )

    def _refinement(self, config: RefinementConfig) -> float:
        """Return the seconds of forwards, moments, factorisations and rounding."""
        call = self.call
        recorded = self.calls * call.forwards * call.rows
        samples = min(recorded, config.samples or default_samples(call.numbers))
        forwards = FORWARDS * samples * call.forward / call.rows
        square = torch.rand(SIDE, SIDE)
        rate = 2 * SIDE**3 / _timed(lambda: square @ square)
        operations = sum(
            operations_of(*shape, self._positions(name, samples, config.positions))
            for name, shape in self.shapes.items()
        )
        return forwards + operations / rate

    def _positions(self, name: str, samples: int, most: int) -> float:
        """Return how many columns a layer multiplies in refinement."""
        adds = self.call.calibration.multiply_adds.get(f"{name}.weight")
        if adds is None:
            return most
        each = adds / self.layers[name].weight.numel() / self.call.rows
        return min(most, samples * each)


def operations_of(groups: int, rows: int, columns: int, positions: float) -> float:
    """Return the number of additions and multiplications to refine a layer."""
    parts = -(-columns // MOST_COLUMNS)
    width = columns / parts
    moments = 2 * positions * width * (width + rows)
    return groups * parts * (moments + 2 * PRODUCTS * rows * width**2 + FACTORED * width**3)


def svd_cost(rows: int, columns: int) -> float:
    """Return a number in proportion to the time of a low-rank branch."""
    short, long = sorted((rows, columns))
    return 2 * short**2 * long + 9 * short**3


def _timed(function: Callable[[], Any]) -> float:
    """Return the seconds of a call, the second one if the first was short."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        function()
        seconds = time.perf_counter() - start
        if seconds > 1:
            break
    return seconds


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
