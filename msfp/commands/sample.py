"""`msfp sample`: images of a packed checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from msfp.commands import options


def add(commands: Any) -> None:
    """Describe the command."""
    sample = commands.add_parser("sample", help="sample images from a quantized checkpoint")
    sample.add_argument("checkpoint", type=Path)
    sample.add_argument("--output", type=Path, required=True, help="a new .png file")
    options.add_sampling(sample, count=16)
    sample.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load a packed checkpoint and write a grid of its images."""
    from msfp.outputs import atomic_file
    from msfp.plots import save_image_grid
    from msfp.progress import counted, stages

    options.check_files(arguments, output=".png")
    sampler = options.check_sampling(arguments)
    pipe = options.load_checkpoint(arguments.checkpoint, arguments)
    with stages() as advance:
        progress = counted(advance, "sampling", arguments.count)
        images = sampler(pipe, arguments.count, arguments.seed, progress)
    with atomic_file(arguments.output) as partial:
        save_image_grid(images, partial)
    print(f"{arguments.count} images: {arguments.output}")
