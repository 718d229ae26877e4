"""Recording the input of every layer while the user's own pipeline samples."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch import nn

from fpformats import Histogram
from msfp.errors import InputError
from msfp.layers.adapters import merged_adapters
from msfp.layers.base import refuse_quantized
from msfp.layers.selection import quantizable_layers
from msfp.pipelines.denoiser import denoiser_name, denoiser_of, timestep_or_none
from msfp.pipelines.sampler import PipelineCall, check_calls
from msfp.schedulers.integer_weights import integer_weights, weight_at
from msfp.search.activation_trace import ActivationTrace
from msfp.search.calibration import Calibration
from msfp.search.product_trace import ProductTrace
from msfp.search.sample_probe import SampleProbe
from msfp.support.checks import check_path
from msfp.support.hooks import hooked
from msfp.support.progress import Progress, counted, shown_progress

SAMPLES_PER_CALL = 4096
"""Numbers drawn from a layer input that has more; its minimum and maximum are added to them."""
DRAWS_AT_ONCE = 16
"""Draws from a layer's inputs that are added to its histogram together, which is much faster."""
SAVE_INTERVAL = 30.0
"""Most seconds of work that a killed process loses, besides the call in progress."""


def draw(x: torch.Tensor, key: str) -> torch.Tensor:
    """Return all numbers of a small tensor, or random numbers and the extremes of a large one.

    Args:
        x: Any shape and floating-point dtype.
        key: Seed of the random numbers. They depend on nothing else, so calls can run in any order
            and in any process.

    Returns:
        A copy, one-dimensional, float32.
    """
    if x.numel() <= SAMPLES_PER_CALL:
        return x.flatten().to(torch.float32, copy=True)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    chosen = torch.randint(x.numel(), (SAMPLES_PER_CALL,), generator=generator)
    return torch.cat([x.take(chosen.to(x.device)), torch.stack(x.aminmax())]).float()


class _Observer:
    """Hooks that add the layers' inputs to histograms during one call of the pipeline.

    Args:
        weights: Weights of the timesteps, or None.
        probe: Finds the layers on the path of the sample in the first forward; None if known.

    Attributes:
        seen: The calibration of this call; layers that did not run are absent.
    """

    def __init__(self, weights: dict[float, int] | None, probe: SampleProbe | None = None) -> None:
        self.seen = Calibration({}, weights=weights)
        self._probe = probe
        self._trace = ActivationTrace()
        self._products: ProductTrace | None = None
        self._tracing = ExitStack()
        self._timestep: float | None = None
        self._repeats = 1
        self._pending: dict[str, list[tuple[int, torch.Tensor]]] = {}

    @contextmanager
    def watching(self, denoiser: nn.Module) -> Iterator[None]:
        """Install hooks on a denoiser and its layers inside the `with` block."""
        hooks = [
            denoiser.register_forward_pre_hook(self._enter, with_kwargs=True),
            denoiser.register_forward_hook(self._leave, with_kwargs=True),
        ]
        for name, layer in quantizable_layers(denoiser).items():
            hooks.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        with hooked(hooks), self._tracing, torch.no_grad():
            yield
        for name in self._pending:
            self._flush(name)

    def _leave(self, denoiser: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Stop tracing, and run the first forward again with another sample."""
        self._tracing.close()
        if self._products is not None:
            self.seen.multiply_adds = dict(self._products.counts)
        if self._probe is not None and not self._probe.done:
            layers = quantizable_layers(denoiser)
            path = self._probe.found(denoiser, layers, (args, kwargs), output)
            self.seen.sample_path, self.seen.readers, self.seen.writers = path

    def _enter(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the timestep of a forward pass; trace functions in the first one."""
        if self._products is None:
            self._products = ProductTrace(denoiser)
            self._tracing.enter_context(self._products)
            self._tracing.enter_context(self._trace)
        timesteps = timestep_or_none(denoiser, args, kwargs)
        if timesteps is not None:
            self._timestep = timesteps[0].item()
            counts = self.seen.timesteps
            counts[self._timestep] = counts.get(self._timestep, 0) + 1
        if self.seen.weights is not None:
            if timesteps is None or (timesteps != timesteps[0]).any():
                raise InputError(
                    "factors need all samples of a forward pass to have the same timestep"
                )
            self._repeats = weight_at(self.seen.weights, timesteps[0].item())

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """Return the hook of a layer."""

        def observe(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: torch.Tensor = args[0] if args else kwargs["input"]
            if self._probe is not None and self._probe.note(name, x):
                return
            if name not in self._pending:
                self._pending[name] = []
                self.seen.inputs[name] = Histogram()
                function = self._trace.function_of(x)
                if function is not None:
                    self.seen.activations[name] = function
            if x.numel():
                numbers = draw(x.detach(), f"{name} {self._timestep}")
                self._pending[name].append((self._repeats, numbers))
            if len(self._pending[name]) == DRAWS_AT_ONCE:
                self._flush(name)

        return observe

    def _flush(self, name: str) -> None:
        """Add the numbers drawn since the last flush to a layer's histogram."""
        drawn, self._pending[name] = self._pending[name], []
        for repeats in sorted({each for each, _ in drawn}):
            numbers = torch.cat([numbers for each, numbers in drawn if each == repeats])
            self.seen.inputs[name].update(numbers, repeats)


def calibrate(
    model: DiffusionPipeline | nn.Module,
    *,
    calls: PipelineCall | Sequence[PipelineCall],
    factors: dict[float, float] | None = None,
    file: str | Path | None = None,
    description: Mapping[str, Any] | None = None,
    progress: Progress = shown_progress,
) -> Calibration:
    """Run calls of a pipeline, and make a histogram of the input of each quantizable layer.

    The size of the histograms does not depend on the number of calls. If torch.distributed is
    initialised, its processes divide the calls among themselves. Each process then returns the same
    result, bit for bit, as a single process with all calls.

    Args:
        model: A pipeline with a full-precision denoiser, or any network to be quantized. LoRAs that
            are loaded are merged into its weights meanwhile.
        calls: A function of `model`, or several functions, each of which sets its own seed.
            `Sampler.calls`, `prompt_calls` and `load_calls` make them. All timesteps that they
            visit count, and all samples of a batch, such as both guidance branches of
            classifier-free guidance.
        factors: The sampler's `denoising_factors`. Each forward pass of the denoiser is weighted
            by the square of the factor of its timestep, in steps of 1/1024 of the largest square,
            and by one step at least. Keys are the timesteps that the denoiser receives (those of
            Flux are divided by 1000). None weights all forward passes equally.
        file: A safetensors file for the state. It is written from time to time, at the end, and
            after an interrupt. If it exists, calibration resumes from it and runs only the missing
            calls. If processes divide the calls, each writes its own file.
        description: What the calls do, such as their prompts and seed, as plain JSON types by
            name. The file stores it. A file with another description is refused.
        progress: Called after each call of the pipeline.

    Returns:
        The histograms of all calls.

    Raises:
        InputError: If there is no denoiser, the denoiser is quantized already, there are no calls,
            a call does not run the denoiser, a timestep has no factor, or the file is the state of
            another calibration.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1), nn.SiLU(), nn.Linear(1, 1))
        >>> calibration = calibrate(network, calls=lambda network: network(torch.ones(4, 1)))
        >>> calibration.inputs["0"], calibration.activations
        (Histogram(4 numbers from 1 to 1), {'2': 'SiLU'})
    """
    denoiser = denoiser_of(model)
    refuse_quantized("the denoiser", denoiser)
    calls = check_calls("calls", calls)
    with merged_adapters(denoiser):
        calibration = Calibration(
            {name: Histogram() for name in quantizable_layers(denoiser)},
            weights=None if factors is None else integer_weights(factors),
            total=len(calls),
            # Converted to JSON and back, as if read from the file.
            description=json.loads(json.dumps(dict(description or {}))),
        )
        shared = dist.is_available() and dist.is_initialized()
        rank, processes = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        if file is not None:
            file = check_path("file", file)
            file = file.with_stem(f"{file.stem}-{rank}-of-{processes}") if shared else file
            calibration = _resumed(calibration, file)
        saved = time.monotonic()
        done = counted(progress, "calibrating", len(range(rank, len(calls), processes)))
        try:
            for index in range(rank, len(calls), processes):
                if index not in calibration.calls:
                    probe = None if calibration.sample_path else SampleProbe()
                    calibration.merge(
                        _seen(model, denoiser, calls[index], index, calibration, probe)
                    )
                done(1)
                if file is not None and time.monotonic() > saved + SAVE_INTERVAL:
                    calibration.save(file)
                    saved = time.monotonic()
        finally:
            if file is not None:
                calibration.save(file)
        if shared:
            calibration.all_reduce()
        return calibration


def _resumed(calibration: Calibration, file: Path) -> Calibration:
    """Return the state in a file, or save and return the new calibration if there is no file."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(file)
        return calibration
    saved = Calibration.load(file)
    try:
        calibration.check_same(saved)
    except InputError as error:
        raise InputError(f"{file} is the state of another calibration: {error}") from error
    return saved


def _seen(
    model: DiffusionPipeline | nn.Module,
    denoiser: nn.Module,
    call: PipelineCall,
    index: int,
    calibration: Calibration,
    probe: SampleProbe | None,
) -> Calibration:
    """Run one call and return its calibration, with all layers of the whole calibration."""
    observer = _Observer(calibration.weights, probe)
    with observer.watching(denoiser):
        call(model)
    seen = observer.seen
    if not seen.inputs:
        name = type(denoiser).__name__ if model is denoiser else denoiser_name(model)
        raise InputError(
            f"call {index} did not run the {name}: give calls that do, or select denoisers by "
            "msfp.select_denoisers"
        )
    seen.calls, seen.total = [index], calibration.total
    seen.description = calibration.description
    seen.inputs |= {name: Histogram() for name in calibration.inputs if name not in seen.inputs}
    return seen
