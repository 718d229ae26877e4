"""`msfp statistics`: compute the feature statistics of a data set for Frechet distances."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from msfp.cli import options
from msfp.cli.loading import device


def add(commands: Any) -> None:
    """Describe the command."""
    statistics = commands.add_parser(
        "statistics", help="take the statistics of a folder of images, for msfp evaluate"
    )
    statistics.add_argument("images", type=Path, help="a folder of images, or of folders of them")
    options.add_features(statistics, required=True)
    statistics.add_argument(
        "--size", type=options.whole(8, 4096), required=True, metavar="PIXELS",
        help="height and width of the model's images, to which the central squares are resized",
    )  # fmt: skip
    statistics.add_argument(
        "--resize", choices=("bicubic", "lanczos"), default="bicubic",
        help="antialiasing filter (default: bicubic)",
    )  # fmt: skip
    statistics.add_argument("--output", type=Path, required=True, help="a new .safetensors file")
    options.add_state(statistics)
    options.add_device(statistics)
    statistics.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read every image, and write the mean and covariance of the features."""
    from msfp.errors import InputError
    from msfp.evaluation.dataset_statistics import STATE, dataset_statistics
    from msfp.evaluation.features import feature_network
    from msfp.support.autosave import check_state
    from msfp.support.progress import progress_bars

    options.check_files(arguments, output=".safetensors")
    if arguments.state is not None:
        check_state(arguments.state, STATE)
        if arguments.state.absolute() == arguments.output.absolute():
            raise InputError(
                f"state and output must be different files, not both {arguments.output}"
            )
    network = feature_network(arguments.features, device(arguments))
    with progress_bars() as progress:
        found = dataset_statistics(
            arguments.images, network, name=arguments.features, size=arguments.size,
            resize=arguments.resize, state=arguments.state, progress=progress,
        )  # fmt: skip
    found.save(arguments.output)
    if arguments.state is not None:
        arguments.state.unlink(missing_ok=True)
    count, features = found.statistics.count, len(found.statistics.mean)
    print(f"{count} images, {features} features: {arguments.output}")
    if count <= features:
        print(f"More images than the {features} features are needed to know their covariance.")
