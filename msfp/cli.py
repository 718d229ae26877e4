"""The command line: `msfp demo`, `msfp quantize`, `msfp sample`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from msfp.config import MAX_BITS, MIN_BITS, QuantizationConfig, Scheme
from msfp.errors import InputError
from msfp.version import __version__

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

REFERENCE = "digits"
TABLE_WIDTH = 100
"""Columns that the demo's table needs; a narrower terminal wraps its lines."""


def _whole(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers in a range."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: it must be a whole number from {low} to {high}"
            )
        return int(text)

    return parse


_SEED = _whole(0, 2**32 - 1)
_STEPS = _whole(1, 1000)
_COUNT = _whole(1, 10**6)


def _add_bits(command: argparse.ArgumentParser) -> None:
    for name, what in (
        ("weights", "weights"),
        ("activations", "layer inputs"),
        ("first-last", "weights and inputs of the first and last layer"),
    ):
        default = 8 if name == "first-last" else 4
        command.add_argument(
            f"--{name}", type=_whole(MIN_BITS, MAX_BITS), default=default, metavar="BITS",
            help=f"bits of {what}, {MIN_BITS} to {MAX_BITS} (default {default})",
        )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(prog="msfp", description="4-bit floating-point diffusion models.")
    top.add_argument("--version", action="version", version=f"msfp {__version__}")
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="quantize and recover the reference model; report")
    demo.add_argument("--output", type=Path, default=Path("msfp-demo"), help="a new folder")
    demo.add_argument("--quick", action="store_true", help="a small run of under 90 seconds")
    demo.add_argument("--seed", type=_SEED, default=0)
    _add_bits(demo)

    quantize = commands.add_parser("quantize", help="quantize a pipeline folder, without training")
    quantize.add_argument("model", help=f"a diffusers pipeline folder, or {REFERENCE!r}")
    quantize.add_argument("--output", type=Path, required=True, help="a new folder")
    quantize.add_argument("--scheme", choices=get_args(Scheme), default="mixup")
    quantize.add_argument(
        "--steps", type=_STEPS, default=20, help="sampler steps of the calibration"
    )
    quantize.add_argument("--seed", type=_SEED, default=0)
    _add_bits(quantize)

    sample = commands.add_parser("sample", help="sample images from a quantized checkpoint")
    sample.add_argument("checkpoint", type=Path)
    sample.add_argument("--output", type=Path, required=True, help="a new PNG file")
    sample.add_argument("--count", type=_COUNT, default=64)
    sample.add_argument("--steps", type=_STEPS, default=20)
    sample.add_argument("--seed", type=_SEED, default=0)
    return top


def _config(arguments: argparse.Namespace, scheme: Scheme = "mixup") -> QuantizationConfig:
    return QuantizationConfig(
        arguments.weights, arguments.activations, arguments.first_last, scheme
    )


def run_demo(arguments: argparse.Namespace) -> None:
    """Run the demo with progress bars, print its table and write its folder."""
    from rich.console import Console

    from msfp.checkpoint import atomic_folder, check_output
    from msfp.demo import bench, report
    from msfp.demo.results import FULL, QUICK, findings
    from msfp.progress import stages

    check_output(arguments.output)
    settings = QUICK if arguments.quick else FULL
    started = time.perf_counter()
    with stages() as advance:
        results = bench.run(_config(arguments), settings, arguments.seed, advance)
    with atomic_folder(arguments.output) as folder:
        report.write(results, folder)
    console = Console()
    console = Console(width=max(console.width, TABLE_WIDTH))
    console.print(report.terminal_table(results))
    for sentence in findings(results):
        console.print(f"- {sentence}")
    minutes = (time.perf_counter() - started) / 60
    console.print(f"Took {minutes:.1f} minutes. Report: {arguments.output / 'report.html'}")


def _pipeline(model: str) -> DiffusionPipeline:
    """Return the pipeline in a folder, or the reference model."""
    from diffusers import DiffusionPipeline

    from msfp.checkpoint import quantized_component
    from msfp.reference import ddim_pipeline

    if model == REFERENCE:
        return ddim_pipeline()
    folder = Path(model)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{model} is not a pipeline folder: it has no model_index.json")
    if quantized_component(folder) is not None:
        raise InputError(f"{model} is quantized already: name a full-precision pipeline")
    try:
        return DiffusionPipeline.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{model} cannot be loaded: {str(error).splitlines()[0]}") from error


def run_quantize(arguments: argparse.Namespace) -> None:
    """Calibrate, search, and write a packed checkpoint."""
    from msfp.checkpoint import check_output, save
    from msfp.denoiser import denoiser_of
    from msfp.observation import calibrate
    from msfp.progress import stages
    from msfp.quantization import quantize, seal
    from msfp.sampling import Sampler

    check_output(arguments.output)
    pipe = _pipeline(arguments.model)
    denoiser = denoiser_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    with stages() as advance:
        calls = Sampler(arguments.steps, batch=16).calls(64, arguments.seed)
        done: list[int] = []
        names: list[str] = []

        def called(count: int) -> None:
            done.append(count)
            advance("calibrating", len(done), len(calls))

        calibration = calibrate(pipe, calls, progress=called)

        def searched(name: str) -> None:
            names.append(name)
            advance("searching", len(names), len(calibration.inputs))

        config = _config(arguments, arguments.scheme)
        layers = quantize(pipe, config, calibration=calibration, progress=searched)
    seal(denoiser)
    save(pipe, arguments.output)
    unsigned = sum(layer.unsigned for layer in layers)
    print(f"{len(layers)} layers quantized, {unsigned} with unsigned inputs: {arguments.output}")


def run_sample(arguments: argparse.Namespace) -> None:
    """Load a packed checkpoint and write a grid of its images."""
    from msfp.checkpoint import check_output, load
    from msfp.plots import save_image_grid
    from msfp.progress import stages
    from msfp.sampling import Sampler

    output, count = arguments.output.absolute(), arguments.count
    check_output(output)
    if output.suffix != ".png" or output.is_dir() or not output.parent.is_dir():
        raise InputError(f"output {output} must be a new .png file in a folder that exists")
    pipe = load(arguments.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    sampler, done = Sampler(arguments.steps, min(64, count)), []
    with stages() as advance:

        def progress(images: int) -> None:
            done.append(images)
            advance("sampling", sum(done), count)

        images = sampler(pipe, count, arguments.seed, progress)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
        save_image_grid(images, Path(folder) / "grid.png")
        (Path(folder) / "grid.png").replace(output)
    print(f"{count} images: {output}")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 for input that cannot be used, 130 when interrupted."""
    arguments = parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        from msfp.runtime import keep_memory

        keep_memory()
        {"demo": run_demo, "quantize": run_quantize, "sample": run_sample}[arguments.command](
            arguments
        )
    except InputError as error:
        print(f"msfp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        written = "" if arguments.output.exists() else "; nothing was written"
        print(f"msfp: interrupted{written}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
