"""`msfp quantize`: quantize a full-precision pipeline to a packed checkpoint, without training."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msfp.cli import options
from msfp.cli.config_options import add_config, config_from
from msfp.cli.loading import NAMED, fuse_loras, load_pipeline
from msfp.config import QuantizationConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fpformats import Histogram
    from msfp.pipelines.sampler import Sampler
    from msfp.pipelines.trajectories import Trajectories
    from msfp.search.calibration import Calibration
    from msfp.search.summary import LayerSummary
    from msfp.support.progress import Progress


def add(commands: Any) -> None:
    """Describe the command."""
    quantize = commands.add_parser("quantize", help="quantize a pipeline folder, without training")
    quantize.add_argument("model", help=f"a diffusers pipeline folder, or {NAMED}")
    quantize.add_argument(
        "--lora", type=options.lora, action="append", default=[], metavar="LORA[=WEIGHT]",
        help="a LoRA file, or a name on the hub, to fuse with the weights first; may be repeated",
    )  # fmt: skip
    quantize.add_argument("--output", type=Path, required=True, help="a new folder")
    quantize.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="a .safetensors file for the calibration, or one for each of several denoisers; if it "
        "exists, calibration resumes from it",
    )  # fmt: skip
    quantize.add_argument(
        "--offload", action="store_true",
        help="have in files what need not be in memory; on a GPU one layer at a time",
    )  # fmt: skip
    quantize.add_argument(
        "--dry-run", action="store_true",
        help="measure one forward, and print what the command would take",
    )  # fmt: skip
    options.add_resume(quantize)
    options.add_report(quantize)
    quantize.add_argument(
        "--components", nargs="+", metavar="NAME",
        help="networks of the pipeline to quantize (default: all its denoisers)",
    )  # fmt: skip
    add_config(quantize, QuantizationConfig, "what is quantized, and how", skip={"budget"})
    _add_budget(quantize)
    options.add_sampling(quantize, count=64)
    quantize.set_defaults(run=run)


def _add_budget(quantize: argparse.ArgumentParser) -> None:
    """Add the two ways to give the budget of the config."""
    budget = quantize.add_argument_group(
        "budget", "bits and branches where they are worth most, at a given size"
    ).add_mutually_exclusive_group()
    budget.add_argument(
        "--bits-per-weight", dest="budget", type=float, metavar="X",
        help="bits for each weight of quantized layers, scales and branches included",
    )  # fmt: skip
    budget.add_argument(
        "--max-size", dest="budget", metavar="SIZE",
        help="size of each denoiser's tensors in the file, such as 500MB",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Calibrate, search, and write a packed checkpoint."""
    from msfp.checkpoint.inspection import inspect_coverage
    from msfp.checkpoint.io import save
    from msfp.layers.selection import quantizable_layers
    from msfp.pipelines.denoiser import by_name, denoisers_of, networks_of, select_denoisers
    from msfp.ptq.quantization import pack
    from msfp.support.files import check_output, existing_folder
    from msfp.support.offloading import at_hand
    from msfp.support.paging import PageFolder, settle
    from msfp.support.progress import progress_bars

    check_output(arguments.output)
    options.check_files(arguments, report=".html")
    _check_calibration(arguments.calibration)
    config = config_from(arguments, QuantizationConfig)
    sampler = options.check_sampling(arguments)
    options.state_folder(arguments)
    pages = PageFolder(existing_folder(arguments.output)) if arguments.offload else None
    pipe = load_pipeline(arguments.model, arguments, pages)
    fuse_loras(pipe, arguments.lora)
    for network in networks_of(pipe).values():  # before the first call, for the same bits
        settle(network, pages)
    if arguments.components is not None:
        pipe = select_denoisers(pipe, arguments.components)
    denoisers = denoisers_of(pipe)
    if arguments.dry_run:
        print(_estimated(pipe, config, sampler, arguments), end="")
        return
    with progress_bars() as progress, ExitStack() as stack:
        for denoiser in denoisers.values():
            stack.enter_context(at_hand(denoiser))
        plain = {} if arguments.report is None else by_name(denoisers, quantizable_layers)
        weights = {name: layer.weight.detach().clone() for name, layer in plain.items()}
        layers, inputs = _quantized(pipe, config, sampler, arguments, progress)
    pack(pipe)
    save(pipe, arguments.output)
    shutil.rmtree(arguments.state, ignore_errors=True)
    unsigned = sum(layer.unsigned for layer in layers)
    for name, weight in arguments.lora:
        print(f"The LoRA {name} is in the weights, times {weight:g}")
    print(f"{len(layers)} layers quantized, {unsigned} with unsigned inputs: {arguments.output}")
    coverage = inspect_coverage(pipe)
    for sentence in [] if coverage is None else coverage.sentences():
        print(sentence)
    if arguments.report is not None:
        from msfp.reports.model_page import ModelReport

        title = _title(arguments.model, config)
        report = ModelReport(title, pipe, inputs, weights)
        options.write_text(arguments.report, report.html())
        print(f"Report: {arguments.report}")


def _estimated(
    pipe: DiffusionPipeline,
    config: QuantizationConfig,
    sampler: Sampler,
    arguments: argparse.Namespace,
) -> str:
    """Return what the quantization of each denoiser would take, in words."""
    from msfp.pipelines.denoiser import denoisers_of, select_denoisers
    from msfp.ptq.estimate import estimate
    from msfp.reports.estimate import describe

    texts = []
    for name, denoiser in denoisers_of(pipe).items():
        part = select_denoisers(pipe, name)
        sampler.arguments(part)
        calls = sampler.calls(arguments.count, arguments.seed)
        found = estimate(part, config, calls=calls, offload=arguments.offload)
        texts.append(describe(found, type(denoiser).__name__, arguments.output))
    return "\n".join(texts)


def _title(model: str, config: QuantizationConfig) -> str:
    inputs = "" if config.activation_bits is None else f"A{config.activation_bits}"
    if config.budget is None:
        return f"{Path(model).name} at W{config.weight_bits}{inputs}"
    unit = "" if isinstance(config.budget, str) else " bits for each weight"
    return f"{Path(model).name} at {config.budget}{unit}{inputs and f', {inputs}'}"


def _check_calibration(file: Path | None) -> None:
    """Check the calibration file, which may exist already."""
    from msfp.search.calibration import Calibration
    from msfp.support.files import check_new_file

    if file is not None and file.exists():
        Calibration.load(file)
    elif file is not None:
        check_new_file("calibration", file, ".safetensors")


def _calibration_file(pipe: DiffusionPipeline, file: Path | None) -> Path | None:
    """Return the calibration file of a selected denoiser: each of several has its own."""
    from msfp.pipelines.denoiser import COMPONENTS, denoiser_name

    several = sum(name in COMPONENTS for name in pipe.components) > 1
    if file is None or not several:
        return file
    return file.with_stem(f"{file.stem}-{denoiser_name(pipe)}")


def _description(
    pipe: DiffusionPipeline, sampler: Sampler, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the settings of the calls, except their number."""
    from msfp.pipelines.denoiser import scheduler_of

    return {
        "labels" if arguments.labels else "prompts": list(sampler.conditions),
        "seed": arguments.seed,
        "steps": sampler.steps,
        "sampler": type(scheduler_of(pipe)).__name__,
        "batch": sampler.batch,
        "guidance scale": sampler.guidance_scale,
        **({"call": sampler.to_dict()["extra"]} if sampler.extra else {}),
        **({"loras": arguments.lora} if arguments.lora else {}),
    }


def _quantized(
    pipe: DiffusionPipeline,
    config: QuantizationConfig,
    sampler: Sampler,
    arguments: argparse.Namespace,
    progress: Progress,
) -> tuple[list[LayerSummary], dict[str, Histogram]]:
    """Quantize the denoisers of a pipeline in place: observe all, then search and refine each.

    Returns:
        The summaries of the layers, and histograms of their inputs, which may be empty.
    """
    from msfp.pipelines.denoiser import denoisers_of, named, select_denoisers
    from msfp.ptq.bit_allocation import allocate_bits
    from msfp.ptq.quantization import quantize
    from msfp.reports.bit_allocation import describe
    from msfp.support.progress import of_part

    names = denoisers_of(pipe)
    parts = {name: select_denoisers(pipe, name) for name in names}
    told = {name: of_part(progress, name) if len(names) > 1 else progress for name in names}
    seen = {
        name: _observed(
            part, config, sampler, arguments, told[name], _folder(arguments, name, names)
        )
        for name, part in parts.items()
    }
    layers: list[LayerSummary] = []
    inputs: dict[str, Histogram] = {}
    for name, part in parts.items():
        calibration, trajectories = seen.pop(name)
        own = config
        if config.budget is not None and trajectories is not None:
            allocation = allocate_bits(
                part, config, calibration=calibration, trajectories=trajectories,
                state=_folder(arguments, name, names), progress=told[name],
            )  # fmt: skip
            own = allocation.apply(config)
            if allocation.chosen:
                print(describe(allocation))
        found = quantize(
            part, own, calibration=calibration, trajectories=trajectories,
            state=_folder(arguments, name, names), offload=arguments.offload, progress=told[name],
        )  # fmt: skip
        layers += [replace(each, name=named(name, each.name, names)) for each in found]
        if calibration is not None:
            inputs |= {named(name, key, names): each for key, each in calibration.inputs.items()}
    return layers, inputs


def _folder(arguments: argparse.Namespace, name: str, names: Collection[str]) -> Path:
    """Return the state folder of one of the denoisers."""
    folder: Path = arguments.state
    return folder / name if len(names) > 1 else folder


def _observed(
    pipe: DiffusionPipeline,
    config: QuantizationConfig,
    sampler: Sampler,
    arguments: argparse.Namespace,
    progress: Progress,
    folder: Path,
) -> tuple[Calibration | None, Trajectories | None]:
    """Calibrate and record one denoiser with the same calls, as far as the config needs it.

    Quantization of weights alone, without refinement, needs neither.
    """
    from msfp.layers.selection import quantizable_layers, settings_by_layer
    from msfp.pipelines.denoiser import denoiser_of, scheduler_of
    from msfp.pipelines.recording import Recording
    from msfp.ptq.bit_allocation import check_budget
    from msfp.ptq.request import needs_trajectories, refinement_of
    from msfp.ptq.state import state_of
    from msfp.search.observers import calibrate

    denoiser = denoiser_of(pipe)
    settings = settings_by_layer(denoiser, config, quantizable_layers(denoiser))
    needs_calibration = any(each.needs_calibration for each in settings.values())
    refinement = refinement_of(denoiser, config, settings, recordable=True)
    if config.budget is not None:
        check_budget(denoiser, config, settings, refinement.branch_rank if refinement else 0)
    needs_recording = needs_trajectories(config, refinement)
    if needs_calibration or needs_recording:
        sampler.arguments(pipe)
    calls = sampler.calls(arguments.count, arguments.seed)
    told = _description(pipe, sampler, arguments)
    state = state_of(folder, denoiser, config)
    facts = told | {
        "count": arguments.count,
        "scheduler": json.dumps(dict(scheduler_of(pipe).config), default=str),
        "components": sorted(pipe.components),
    }
    recording = None
    if needs_recording:
        recording = Recording(calls, state.calls, state.fingerprint | facts)
        recording.read(denoiser)
    calibration = trajectories = None
    if needs_calibration:
        given = _calibration_file(pipe, arguments.calibration)
        calibration = calibrate(
            pipe, calls=calls if recording is None else recording.calls,
            file=given or state.calibration, progress=progress,
            description=told if given else state.fingerprint | facts,
        )  # fmt: skip
    if recording is not None:  # makes the calls if the calibration was read from its file
        trajectories = recording.trajectories(pipe, progress)
    return calibration, trajectories
