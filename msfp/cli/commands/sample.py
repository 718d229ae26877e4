"""`msfp sample`: sample images from a packed checkpoint or a full-precision pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msfp.cli import options
from msfp.cli.loading import NAMED, load_any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from msfp.pipelines.sampler import Sampler


def add(commands: Any) -> None:
    """Describe the command."""
    sample = commands.add_parser("sample", help="sample images from a quantized checkpoint")
    sample.add_argument(
        "checkpoint", type=Path,
        help=f"a folder of msfp quantize, a full-precision pipeline folder, {NAMED}",
    )  # fmt: skip
    where = sample.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, help="a new .png file: all images as one picture")
    where.add_argument(
        "--images", dest="folder", type=Path, metavar="FOLDER",
        help="a folder with a .png file for each image, new or of a run to resume",
    )  # fmt: skip
    options.add_sampling(sample, count=16)
    sample.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load a pipeline, and write its images as a grid or as files."""
    options.check_files(arguments, output=".png")
    sampler = options.check_sampling(arguments)
    pipe = load_any(arguments.checkpoint, arguments)
    sampler.arguments(pipe)
    if arguments.folder is None:
        _write_grid(pipe, sampler, arguments)
    else:
        _write_files(pipe, sampler, arguments)


def _write_grid(pipe: DiffusionPipeline, sampler: Sampler, arguments: argparse.Namespace) -> None:
    """Write one picture of all images."""
    from msfp.reports.figures import save_image_grid
    from msfp.support.files import atomic_file
    from msfp.support.progress import progress_bars

    with progress_bars() as progress:
        images = sampler(pipe, arguments.count, arguments.seed, progress=progress)
    with atomic_file(arguments.output) as partial:
        save_image_grid(images, partial)
    print(f"{arguments.count} images: {arguments.output}")


def _write_files(pipe: DiffusionPipeline, sampler: Sampler, arguments: argparse.Namespace) -> None:
    """Write a file for each image that does not exist yet."""
    from msfp.support.image_files import PngFolder
    from msfp.support.progress import counted, progress_bars

    settings = {
        "model": str(arguments.checkpoint),
        "seed": arguments.seed,
        "scheduler": type(getattr(pipe, "scheduler", None)).__name__,
        "dtype": arguments.dtype,
        **sampler.to_dict(),
    }
    folder = PngFolder(arguments.folder, settings)
    with progress_bars() as progress:
        done = counted(progress, "sampling", arguments.count)
        for start in range(0, arguments.count, sampler.batch):
            numbers = range(start, min(start + sampler.batch, arguments.count))
            if not folder.has(numbers):
                images = sampler.one_batch(pipe, arguments.seed, start)
                folder.write(images[: len(numbers)], start)
            done(len(numbers))
    print(f"{arguments.count} images: {arguments.folder}")
