"""`msfp statistics`: what a Frechet distance has to know of a data set, from its images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from msfp.cli.commands import options


def add(commands: Any) -> None:
    """Describe the command."""
    statistics = commands.add_parser(
        "statistics", help="take the statistics of a folder of images, for msfp evaluate"
    )
    statistics.add_argument("images", type=Path, help="a folder of images, or of folders of them")
    options.add_features(statistics, required=True)
    statistics.add_argument(
        "--size", type=options.whole(8, 4096), required=True, metavar="PIXELS",
        help="height and width of the model's images, which the central squares are brought to",
    )  # fmt: skip
    statistics.add_argument(
        "--resize", choices=("bicubic", "lanczos"), default="bicubic",
        help="antialiasing filter (default: bicubic)",
    )  # fmt: skip
    statistics.add_argument("--output", type=Path, required=True, help="a new .safetensors file")
    options.add_state(statistics)
    statistics.add_argument("--device", help="of the network (default: cuda where there is one)")
    statistics.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read every image, and write mean and covariance of their features."""
    from msfp.errors import InputError
    from msfp.evaluation.dataset_statistics import KIND, reference_statistics
    from msfp.evaluation.features import feature_network
    from msfp.support.autosave import check_state
    from msfp.support.files import atomic_file
    from msfp.support.image_files import image_files
    from msfp.support.progress import counted, stages

    options.check_files(arguments, output=".safetensors")
    if arguments.state is not None:
        check_state(arguments.state, KIND)
        if arguments.state.absolute() == arguments.output.absolute():
            raise InputError(f"state must be another file than output, {arguments.output}")
    network = feature_network(arguments.features, options.device(arguments))
    count = len(image_files(arguments.images))
    with stages() as advance:
        found = reference_statistics(
            arguments.images, network, name=arguments.features, size=arguments.size,
            resize=arguments.resize, state=arguments.state,
            progress=counted(advance, "images", count),
        )  # fmt: skip
    with atomic_file(arguments.output) as partial:
        found.save(partial)
    if arguments.state is not None:
        arguments.state.unlink(missing_ok=True)
    features = len(found.statistics.mean)
    print(f"{count} images, {features} features: {arguments.output}")
    if count <= features:
        print(f"More images than the {features} features are needed to know their covariance.")
