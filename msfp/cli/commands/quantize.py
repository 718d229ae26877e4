"""`msfp quantize`: from a full-precision pipeline to a packed checkpoint, without training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from msfp.cli.commands import options
from msfp.config import FLOAT_SCHEMES, Granularity, QuantizationConfig, Scheme
from msfp.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from msfp.pipelines.sampler import Sampler
    from msfp.search.calibration import Calibration
    from msfp.search.summary import LayerSummary


def add(commands: Any) -> None:
    """Describe the command."""
    quantize = commands.add_parser("quantize", help="quantize a pipeline folder, without training")
    quantize.add_argument("model", help=f"a diffusers pipeline folder, or {options.REFERENCE!r}")
    quantize.add_argument("--output", type=Path, required=True, help="a new folder")
    options.add_bits(quantize)
    quantize.add_argument(
        "--scheme", choices=get_args(Scheme), default="mixup", help="default: mixup"
    )
    quantize.add_argument(
        "--granularity", choices=get_args(Granularity), default="channel",
        help="what shares a scale of the weights (default: channel)",
    )  # fmt: skip
    quantize.add_argument(
        "--include", action="append", metavar="GLOB", help="layers or modules; can be repeated"
    )
    quantize.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB",
        help="layers or modules to leave in full precision; can be repeated",
    )  # fmt: skip
    quantize.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="a .safetensors file that keeps the calibration, and goes on from where it was",
    )  # fmt: skip
    quantize.add_argument(
        "--refine", action=argparse.BooleanOptionalAction,
        help="round the weights anew, by what they do to outputs (default; of floating point)",
    )  # fmt: skip
    quantize.add_argument(
        "--attention", type=options.bits, metavar="BITS",
        help="bits of the operands of attention's products (default: left as they are)",
    )  # fmt: skip
    options.add_report(quantize)
    options.add_sampling(quantize, count=64)
    quantize.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Calibrate, search, and write a packed checkpoint."""
    from msfp.checkpoint.io import save
    from msfp.pipelines.denoiser import denoiser_of, quantizable_layers
    from msfp.ptq.quantization import seal
    from msfp.support.files import check_output

    check_output(arguments.output)
    options.check_files(arguments, report=".html")
    _check_calibration(arguments.calibration)
    config = _config(arguments)
    sampler = options.check_sampling(arguments)
    pipe = options.load_pipeline(arguments.model, arguments)
    denoiser = denoiser_of(pipe)
    plain = {} if arguments.report is None else quantizable_layers(denoiser)
    weights = {name: layer.weight.detach().clone() for name, layer in plain.items()}
    layers, calibration = _quantized(pipe, config, sampler, arguments)
    seal(denoiser)
    save(pipe, arguments.output)
    unsigned = sum(layer.unsigned for layer in layers)
    print(f"{len(layers)} layers quantized, {unsigned} with unsigned inputs: {arguments.output}")
    if arguments.report is not None:
        from msfp.reports.model_page import ModelReport

        inputs = calibration.inputs if calibration is not None else {}
        report = ModelReport(_title(arguments), denoiser, inputs, weights)
        options.write_text(arguments.report, report.html())
        print(f"Report: {arguments.report}")


def _title(arguments: argparse.Namespace) -> str:
    inputs = "" if arguments.activations is None else f"A{arguments.activations}"
    return f"{Path(arguments.model).name} at W{arguments.weights}{inputs}"


def _config(arguments: argparse.Namespace) -> QuantizationConfig:
    floats = arguments.scheme in FLOAT_SCHEMES
    if arguments.refine and not floats:
        raise InputError(
            f"refine needs a scheme of floating point, {' or '.join(FLOAT_SCHEMES)}, not "
            f"{arguments.scheme}"
        )
    return QuantizationConfig(
        arguments.weights,
        arguments.activations,
        arguments.first_last,
        arguments.scheme,
        include=tuple(arguments.include or ("*",)),
        exclude=tuple(arguments.exclude),
        granularity=arguments.granularity,
        refine=None if arguments.refine is False or not floats else "auto",
        attention=arguments.attention,
    )


def _check_calibration(file: Path | None) -> None:
    """Check the file of a calibration, which may exist."""
    from msfp.search.calibration import Calibration
    from msfp.support.files import check_new_file

    if file is not None and file.exists():
        Calibration.load(file)
    elif file is not None:
        check_new_file("calibration", file, ".safetensors")


def _description(
    pipe: DiffusionPipeline, sampler: Sampler, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return what the calls do; their number goes without saying."""
    return {
        "labels" if arguments.labels else "prompts": list(sampler.conditions),
        "seed": arguments.seed,
        "steps": sampler.steps,
        "sampler": type(pipe.scheduler).__name__,
        "batch": sampler.batch,
        "guidance scale": sampler.guidance_scale,
    }


def _quantized(
    pipe: DiffusionPipeline,
    config: QuantizationConfig,
    sampler: Sampler,
    arguments: argparse.Namespace,
) -> tuple[list[LayerSummary], Calibration | None]:
    """Calibrate and record by the same calls, search and refine, with a bar for each.

    Weights that are not refined take nothing but a search.
    """
    from msfp.pipelines.denoiser import denoiser_of, quantizable_layers, settings_by_layer
    from msfp.pipelines.trajectories import Recording
    from msfp.ptq.quantization import quantize, refinement_of
    from msfp.search.observers import calibrate
    from msfp.support.progress import counted, stages

    denoiser = denoiser_of(pipe)
    settings = settings_by_layer(denoiser, config, quantizable_layers(denoiser))
    needs_calibration = any(each.needs_calibration for each in settings.values())
    refinement = refinement_of(denoiser, config, settings, recordable=True)
    needs_recording = refinement is not None or config.attention is not None
    calibration = trajectories = None
    with stages() as advance:
        if needs_calibration or needs_recording:
            sampler.arguments(pipe)
        calls = sampler.calls(arguments.count, arguments.seed)
        recording = Recording(calls) if needs_recording else None
        calls = calls if recording is None else recording.calls
        if needs_calibration:
            progress = counted(advance, "calibrating", len(calls))
            calibration = calibrate(
                pipe, calls, file=arguments.calibration, progress=progress,
                description=_description(pipe, sampler, arguments),
            )  # fmt: skip
        if recording is not None:
            # A calibration that was read from its file has made no calls.
            left = len(recording.missing)
            bar = counted(advance, "recording", left) if left else None
            trajectories = recording.trajectories(pipe, bar)
        searched: set[str] = set()
        searching = counted(advance, "searching", len(settings))
        refining = counted(advance, "refining", len(settings))

        def found(name: str) -> None:
            (refining if name in searched else searching)(1)
            searched.add(name)

        layers = quantize(
            pipe, config, calibration=calibration, trajectories=trajectories, progress=found
        )
    return layers, calibration
