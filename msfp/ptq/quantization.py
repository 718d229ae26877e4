"""Quantizing a whole denoiser: from full precision to trainable layers, then to packed layers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from msfp.checkpoint.diffusers_quantizer import attach, attach_again, detach
from msfp.config import LayerSettings, QuantizationConfig, RefinementConfig
from msfp.errors import InputError
from msfp.layers.adapters import merge_adapters, merged_names
from msfp.layers.base import refuse_quantized
from msfp.layers.selection import quantizable_layers, replace_layers, settings_by_layer
from msfp.layers.trainable import trainable_layers
from msfp.pipelines.denoiser import (
    Networks,
    denoiser_of,
    denoisers_of,
    named,
    networks_of,
    select_denoisers,
)
from msfp.pipelines.recording import Recording
from msfp.pipelines.sampler import PipelineCall, check_calls
from msfp.pipelines.trajectories import Trajectories
from msfp.ptq.attention_products import quantize_attention
from msfp.ptq.bit_allocation import allocate, check_budget
from msfp.ptq.measured import measured_on
from msfp.ptq.refinement import refine_kept
from msfp.ptq.request import needs_trajectories, refinement_of, settings_of
from msfp.ptq.side_by_side import SharedValuesError
from msfp.ptq.space import check_disk, check_memory
from msfp.ptq.state import (
    QuantizationState,
    searched_layer,
    state_of,
)
from msfp.search.calibration import Calibration
from msfp.search.coverage import Coverage
from msfp.search.observers import calibrate
from msfp.search.summary import LayerSummary
from msfp.support.checks import check_path, check_truth, check_type
from msfp.support.files import check_folder
from msfp.support.malloc import release_memory
from msfp.support.offloading import at_work, with_weights, work_device
from msfp.support.paging import PageFolder, is_unaligned, settle
from msfp.support.progress import Progress, counted, of_part, shown_progress


@with_weights(denoisers_of)
def quantize(
    model: DiffusionPipeline | nn.Module,
    config: QuantizationConfig | None = None,
    *,
    calibration: Calibration | PipelineCall | Sequence[PipelineCall] | None = None,
    trajectories: Trajectories | None = None,
    state: str | Path | None = None,
    offload: bool = False,
    progress: Progress = shown_progress,
) -> list[LayerSummary]:
    """Quantize the denoisers of a pipeline, or a network, in place.

    Trainable quantized layers replace the layers that the config selects, and share their
    parameters. With block schemes, and without refinement, packed layers replace them, as in
    `msfp.layers.block`.

    Denoisers may be offloaded by Accelerate (`cpu_offload`, `disk_offload`, a device map) or
    diffusers (`enable_sequential_cpu_offload`, `enable_group_offload`). Their hooks are off while
    the function runs, and on again after it. Each layer is then on the device of the hooks while
    it is searched, refined or runs, and else on the host.

    Args:
        model: A pipeline or its denoiser, in full precision. All denoisers of a pipeline are
            quantized, each as its own calls show it; `select_denoisers` selects some. LoRAs that
            are loaded into a denoiser, or fused with it, are merged into its weights as they are in
            use, with their scales. They are then no longer loaded; those of text encoders stay.
        config: Bit widths, scheme, selection of layers, and refinement of weights; None for the
            defaults.
        calibration: The result of `calibrate` for the same denoiser, or calls of the pipeline to
            calibrate with. Not needed if inputs are not quantized, or use block formats.
        trajectories: The result of `record_trajectories` for the same denoiser, to refine weights
            with. Not needed if `calibration` is calls: these are recorded while they run.
        state: A folder that keeps what is done: recorded calls, calibration, and the layers that
            were searched and refined. If the process is killed, the same call of this function
            with the same model resumes from it, and gives the same bits. Calls must be the same
            then. None keeps nothing.
        offload: Whether refinement has in files what need not be in memory: samples that wait, and
            full-precision weights that are not needed again. The files are in the state folder, or
            in that for temporary files. The bits of the result are the same.
        progress: Called as each stage advances.

    Returns:
        One summary for each layer, with the formats chosen. If several denoisers are quantized,
        the names of layers begin with that of their component, as in "transformer_2.proj_out".

    Raises:
        InputError: If the pipeline has no denoiser, a denoiser is quantized already or is a layer
            itself, calls do not run it, an argument has the wrong type, no first or last layer is
            found although these have other bits, a glob matches nothing, the calibration is missing
            or belongs to another denoiser, the config asks for refinement without calls or
            trajectories, a weight or an input is not finite, a weight is on the meta device
            although no hook has its numbers, or PEFT cannot merge a LoRA. The denoisers are then
            unchanged.

    Warns:
        UserWarning: If layers never ran during calibration; they stay in full precision. Also if
            the calls cannot be recorded; weights are then rounded to the nearest value. Also of the
            LoRAs that were merged, and of those that were not in use and are gone.

    Example:
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        >>> config = QuantizationConfig(weight_bits=4, activation_bits=None, end_bits=4)
        >>> [layer.name for layer in quantize(network, config)]
        ['0', '2']
    """
    config = QuantizationConfig() if config is None else config
    check_type("config", config, QuantizationConfig)
    check_truth("offload", offload)
    if state is not None:
        check_folder("state", check_path("state", state))
    if trajectories is not None:
        check_type("trajectories", trajectories, Trajectories)
    if not isinstance(calibration, Calibration | None):
        calibration = check_calls("calibration", calibration, " or what msfp.calibrate returned")
    denoisers = denoisers_of(model)
    if trajectories is not None or isinstance(calibration, Calibration):
        denoiser_of(model)  # they are of one denoiser
    names = {name: merged_names(each) for name, each in denoisers.items()}
    with ExitStack() as undo:
        for each in denoisers.values():
            undo.callback(merge_adapters(each))
        summaries = _quantized(
            model, config, denoisers, calibration, trajectories, state, progress, offload=offload
        )
        undo.pop_all()
    for name, each in denoisers.items():
        _tell_of_adapters(type(each).__name__, *names[name])
    return summaries


def _tell_of_adapters(kind: str, merged: Sequence[str], left_out: Sequence[str]) -> None:
    """Warn that a network has lost its adapters."""
    for names, what in ((merged, "merged into its weights"), (left_out, "removed: not in use")):
        if names:
            warnings.warn(f"LoRAs of {kind} were {what}: {', '.join(names)}", stacklevel=4)


def _quantized(
    model: DiffusionPipeline | nn.Module,
    config: QuantizationConfig,
    denoisers: Networks,
    calibration: Calibration | Sequence[PipelineCall] | None,
    trajectories: Trajectories | None,
    state: str | Path | None,
    progress: Progress,
    *,
    offload: bool,
) -> list[LayerSummary]:
    """Quantize denoisers without adapters, as `quantize` does."""
    parts = [
        _Quantization(model if len(denoisers) == 1 else select_denoisers(model, name), config)
        for name in denoisers
    ]
    for part in parts:  # errors are raised before anything runs
        part.check(calibration, trajectories)
    _check_space(parts, state, offload=offload)
    if state is not None:
        for name, part in zip(denoisers, parts, strict=True):
            part.keep_in(Path(state, name) if len(denoisers) > 1 else Path(state))
    for name, part in zip(denoisers, parts, strict=True):
        part.settle(offload=offload)
        part.observe(calibration, trajectories, _of_part(progress, name, denoisers))
    summaries: list[LayerSummary] = []
    try:
        for name, part in zip(denoisers, parts, strict=True):
            found = part.quantize(_of_part(progress, name, denoisers))
            summaries += [replace(each, name=named(name, each.name, denoisers)) for each in found]
    except BaseException:
        for part in parts:
            part.undo()
        raise
    return summaries


def _check_space(
    parts: Sequence[_Quantization], state: str | Path | None, *, offload: bool
) -> None:
    """Raise InputError if a quantization does not fit the memory or the disk."""
    refined = [layer for part in parts if part.refinement for layer in part.plain.values()]
    check_disk(sum(layer.weight.nbytes for layer in refined), state, offload=offload)
    for part in parts:
        if work_device(part.denoiser).type == "cpu":
            layers = list(part.plain.values())
            copied = sum(p.nbytes for p in part.denoiser.parameters() if is_unaligned(p))
            refine = part.refinement is not None
            check_memory(layers, refined=refine, offload=offload, copied=copied)


def _of_part(progress: Progress, name: str, denoisers: Networks) -> Progress:
    """Return the progress of one denoiser, named if there are several."""
    return of_part(progress, name) if len(denoisers) > 1 else progress


class _Quantization:
    """The quantization of one denoiser.

    Args:
        model: The pipeline, with one denoiser, or the denoiser.
        config: What is quantized, and how.
    """

    def __init__(self, model: DiffusionPipeline | nn.Module, config: QuantizationConfig) -> None:
        self.model, self.denoiser, self.config = model, denoiser_of(model), config
        refuse_quantized("the denoiser", self.denoiser)
        self.plain = quantizable_layers(self.denoiser)
        self.refinement: RefinementConfig | None = None
        self.seen: Calibration | None = None
        self.trajectories: Trajectories | None = None
        self.state: QuantizationState | None = None
        self.pages: PageFolder | None = None
        self.swapped: dict[nn.Module, nn.Module] = {}
        self.attached = False

    def keep_in(self, folder: Path) -> None:
        """Keep what is done in a folder."""
        self.state = state_of(folder, self.denoiser, self.config)

    def settle(self, *, offload: bool) -> None:
        """Have the weights in files or in memory, before the calls."""
        folder = Path(tempfile.gettempdir()) if self.state is None else self.state.folder
        self.pages = PageFolder(folder) if offload else None
        settle(self.denoiser, self.pages)

    def check(
        self,
        calibration: Calibration | Sequence[PipelineCall] | None,
        trajectories: Trajectories | None,
    ) -> None:
        """Raise InputError if the config does not suit the denoiser, or what it needs is missing.

        Args:
            calibration: As for `quantize`.
            trajectories: As for `quantize`.
        """
        settings = settings_by_layer(self.denoiser, self.config, self.plain)
        calls = calibration is not None and not isinstance(calibration, Calibration)
        self.refinement = refinement_of(
            self.denoiser, self.config, settings, recordable=calls or trajectories is not None
        )
        if self.config.budget is not None:
            rank = 0 if self.refinement is None else self.refinement.branch_rank
            check_budget(self.denoiser, self.config, settings, rank)

    def observe(
        self,
        calibration: Calibration | Sequence[PipelineCall] | None,
        trajectories: Trajectories | None,
        progress: Progress,
    ) -> None:
        """Make the calls, if there are calls, and keep what they show.

        Args:
            calibration: As for `quantize`.
            trajectories: As for `quantize`.
            progress: Called after each call.
        """
        self.trajectories = trajectories
        if calibration is None or isinstance(calibration, Calibration):
            self.seen = calibration
        elif trajectories is None and needs_trajectories(self.config, self.refinement):
            folder, facts = None, {}
            if self.state is not None:
                folder, facts = self.state.calls, self.state.fingerprint
            recording = Recording(calibration, folder, facts)
            recording.read(self.denoiser)
            self.seen = self._calibrated(recording.calls, progress)
            self.trajectories = _recorded(self.model, recording, self.config)
        else:
            self.seen = self._calibrated(calibration, progress)
        if self.trajectories is None:
            self.refinement = None

    def _calibrated(self, calls: Sequence[PipelineCall], progress: Progress) -> Calibration:
        file, facts = None, None
        if self.state is not None:
            file, facts = self.state.calibration, self.state.fingerprint
        return calibrate(self.model, calls=calls, file=file, description=facts, progress=progress)

    def quantize(self, progress: Progress) -> list[LayerSummary]:
        """Search each layer, replace the layers, and refine; return their summaries.

        Args:
            progress: Called as each stage advances.
        """
        settings = settings_of(self.denoiser, self.config, self.seen)
        counts = None if self.seen is None else self.seen.multiply_adds
        coverage = Coverage.of(self.denoiser, counts or None)
        done = counted(progress, "searching", len(settings))
        if self.state is not None:
            self.state = self.state.of_data(self.seen, self.trajectories)
        settings = self._within_budget(settings, progress)
        pages = self.pages
        layers, summaries = {}, []
        for name, each in settings.items():
            layers[name], summary = searched_layer(
                name, self.plain[name], each, self.seen, self.state,
                refined=self.refinement is not None,
            )  # fmt: skip
            summaries.append(summary)
            if pages is not None:
                pages.drop(self.plain[name].weight)
            release_memory()
            done(1)
        self.swapped = {self.plain[name]: layer for name, layer in layers.items()}
        replace_layers(self.denoiser, self.swapped)
        ranks = {n: s.branch_rank for n, s in settings.items() if s.branch_rank is not None}
        self._refine(ranks, progress, pages)
        found = [
            summary.with_formats(layer.formats)
            for layer, summary in zip(layers.values(), summaries, strict=True)
        ]
        paths = self.trajectories
        measured = None if paths is None else measured_on(self.denoiser, paths)
        request = replace(self.config, refine=self.refinement)
        attach(self.denoiser, request, summaries=found, coverage=coverage, measured=measured)
        self.attached = True
        return found

    def _within_budget(
        self, settings: dict[str, LayerSettings], progress: Progress
    ) -> dict[str, LayerSettings]:
        """Return the settings of all layers with what the budget, if any, chooses for some."""
        paths = self.trajectories
        if self.config.budget is None or paths is None:
            return settings
        found = allocate(
            self.denoiser, self.config, settings, self.refinement, self.seen, paths, self.state,
            progress,
        )  # fmt: skip
        self.config = found.apply(self.config)
        return found.settings(settings)

    def _refine(self, ranks: dict[str, int], progress: Progress, pages: PageFolder | None) -> None:
        """Refine the weights and quantize the products of attention, where the config says so."""
        paths, bits = self.trajectories, self.config.attention_bits
        if paths is not None and self.refinement is not None:
            try:
                refine_kept(
                    self.denoiser, self.refinement, paths, self.state, pages, progress, ranks
                )
            except SharedValuesError as error:  # before anything was changed
                if self.config.refine != "auto" or self.config.budget is not None:
                    raise  # a budget counts on the branches
                warnings.warn(f"weights are rounded to nearest: {error}", stacklevel=6)
                self.refinement = None
        if paths is not None and bits is not None:
            quantize_attention(self.denoiser, bits, trajectories=paths)

    def undo(self) -> None:
        """Put the plain layers back."""
        replace_layers(self.denoiser, {layer: plain for plain, layer in self.swapped.items()})
        if self.attached:
            detach(self.denoiser)
            del self.denoiser.hf_quantizer


def _recorded(
    model: DiffusionPipeline | nn.Module, recording: Recording, config: QuantizationConfig
) -> Trajectories | None:
    """Return the trajectories of calls, or None if they cannot be recorded and are optional."""
    try:
        return recording.trajectories(model)
    except InputError as error:
        if config.refine != "auto" or needs_trajectories(config, None):
            raise
        warnings.warn(f"weights are rounded to nearest and not refined: {error}", stacklevel=6)
        return None


def _trained(model: DiffusionPipeline | nn.Module) -> Networks:
    """Return the networks of a model that have trainable layers, by component."""
    denoisers_of(model)
    return {name: each for name, each in networks_of(model).items() if trainable_layers(each)}


@with_weights(_trained)
def pack(model: DiffusionPipeline | nn.Module) -> list[str]:
    """Replace trainable layers by packed ones, in place; the denoisers can then be saved.

    Args:
        model: A pipeline or its denoiser, quantized by `quantize`.

    Returns:
        The names of the layers, with that of their component as `quantize` returns them.

    Raises:
        InputError: If the pipeline has no denoiser.
    """
    trained = _trained(model)
    return [named(k, layer, trained) for k, each in trained.items() for layer in _pack(each)]


def _pack(denoiser: nn.Module) -> list[str]:
    """Pack the layers of one network, and return their names."""
    trainable = trainable_layers(denoiser)
    names, layers = list(trainable), list(trainable.values())
    del trainable
    while layers:  # one by one, to free each full-precision weight early
        layer = layers.pop()
        with at_work(layer):
            replace_layers(denoiser, {layer: layer.pack()})
        del layer
        release_memory()
    attach_again(denoiser, same_outputs=True)
    return names
