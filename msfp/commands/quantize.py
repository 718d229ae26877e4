"""`msfp quantize`: from a full-precision pipeline to a packed checkpoint, without training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from msfp.commands import options
from msfp.config import BLOCK_BITS, Granularity, QuantizationConfig, Scheme

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from msfp.calibration import Calibration
    from msfp.progress import Advance
    from msfp.sampling import Sampler
    from msfp.summary import LayerSummary


def add(commands: Any) -> None:
    """Describe the command."""
    quantize = commands.add_parser("quantize", help="quantize a pipeline folder, without training")
    quantize.add_argument("model", help=f"a diffusers pipeline folder, or {options.REFERENCE!r}")
    quantize.add_argument("--output", type=Path, required=True, help="a new folder")
    options.add_bits(quantize)
    savable = [scheme for scheme in get_args(Scheme) if scheme not in BLOCK_BITS]
    quantize.add_argument("--scheme", choices=savable, default="mixup", help="default: mixup")
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
    options.add_report(quantize)
    options.add_sampling(quantize, count=64)
    quantize.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Calibrate, search, and write a packed checkpoint."""
    from msfp.checkpoint import save
    from msfp.denoiser import denoiser_of, quantizable_layers
    from msfp.outputs import check_output
    from msfp.progress import stages
    from msfp.quantization import seal

    check_output(arguments.output)
    options.check_files(arguments, report=".html")
    _check_calibration(arguments.calibration)
    config = _config(arguments)
    sampler = options.check_sampling(arguments)
    pipe = options.load_pipeline(arguments.model, arguments)
    denoiser = denoiser_of(pipe)
    plain = {} if arguments.report is None else quantizable_layers(denoiser)
    weights = {name: layer.weight.detach().clone() for name, layer in plain.items()}
    with stages() as advance:
        calibration = _calibrated(pipe, config, sampler, arguments, advance)
        layers = _quantized(pipe, config, calibration, advance)
    seal(denoiser)
    save(pipe, arguments.output)
    unsigned = sum(layer.unsigned for layer in layers)
    print(f"{len(layers)} layers quantized, {unsigned} with unsigned inputs: {arguments.output}")
    if arguments.report is not None:
        from msfp.model_report import ModelReport

        inputs = calibration.inputs if calibration is not None else {}
        report = ModelReport(_title(arguments), denoiser, inputs, weights)
        options.write_text(arguments.report, report.html())
        print(f"Report: {arguments.report}")


def _title(arguments: argparse.Namespace) -> str:
    inputs = "" if arguments.activations is None else f"A{arguments.activations}"
    return f"{Path(arguments.model).name} at W{arguments.weights}{inputs}"


def _config(arguments: argparse.Namespace) -> QuantizationConfig:
    return QuantizationConfig(
        arguments.weights,
        arguments.activations,
        arguments.first_last,
        arguments.scheme,
        include=tuple(arguments.include or ("*",)),
        exclude=tuple(arguments.exclude),
        granularity=arguments.granularity,
    )


def _check_calibration(file: Path | None) -> None:
    """Check the file of a calibration, which may exist."""
    from msfp.calibration import Calibration
    from msfp.outputs import check_new_file

    if file is not None and file.exists():
        Calibration.load(file)
    elif file is not None:
        check_new_file("calibration", file, ".safetensors")


def _calibrated(
    pipe: DiffusionPipeline,
    config: QuantizationConfig,
    sampler: Sampler,
    arguments: argparse.Namespace,
    advance: Advance,
) -> Calibration | None:
    """Return what was seen while the pipeline sampled; None where inputs are left alone."""
    from msfp.denoiser import denoiser_of, quantizable_layers, settings_by_layer
    from msfp.observation import calibrate
    from msfp.progress import counted

    denoiser = denoiser_of(pipe)
    settings_by_layer(denoiser, config, quantizable_layers(denoiser))
    if config.activations is None:
        return None
    sampler.arguments(pipe)
    calls = sampler.calls(arguments.count, arguments.seed)
    progress = counted(advance, "calibrating", len(calls))
    return calibrate(pipe, calls, file=arguments.calibration, progress=progress)


def _quantized(
    pipe: DiffusionPipeline,
    config: QuantizationConfig,
    calibration: Calibration | None,
    advance: Advance,
) -> list[LayerSummary]:
    """Search and swap the layers."""
    from msfp.denoiser import denoiser_of, settings_by_layer
    from msfp.progress import counted
    from msfp.quantization import quantize

    executed = None if calibration is None else calibration.ran
    total = len(settings_by_layer(denoiser_of(pipe), config, executed))
    progress = counted(advance, "searching", total)
    return quantize(pipe, config, calibration=calibration, progress=lambda _: progress(1))
