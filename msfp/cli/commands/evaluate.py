"""`msfp evaluate`: compare a packed checkpoint with the full-precision pipeline, at equal seeds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msfp.cli import options
from msfp.cli.loading import NAMED, device, load_checkpoint, load_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from msfp.evaluation.comparison import Comparison
    from msfp.evaluation.dataset_statistics import DatasetStatistics

FEATURES = {"digits": "digits", "digits-transformer": "digits", "photographs": "photographs"}
"""The default features for each model that ships."""


def add(commands: Any) -> None:
    """Describe the command."""
    evaluate = commands.add_parser(
        "evaluate", help="compare a quantized checkpoint with its full-precision pipeline"
    )
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument(
        "--original", required=True, metavar="MODEL",
        help=f"the full-precision pipeline folder, or {NAMED}",
    )  # fmt: skip
    options.add_features(evaluate)
    evaluate.add_argument(
        "--statistics", type=Path, metavar="FILE",
        help="statistics of a data set, from msfp statistics, to measure the distance from as well",
    )  # fmt: skip
    evaluate.add_argument(
        "--json", type=Path, metavar="FILE", help="a new .json file, or - for standard output"
    )
    options.add_report(evaluate)
    options.add_state(evaluate)
    # The noise differs from that of calibration.
    options.add_sampling(evaluate, count=64, first_seed=1000)
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compare, print a table, and write the requested files."""
    from msfp.errors import InputError
    from msfp.evaluation.comparison import compare
    from msfp.evaluation.dataset_statistics import DatasetStatistics
    from msfp.evaluation.features import feature_network
    from msfp.evaluation.fingerprint import STATE
    from msfp.support.autosave import check_state
    from msfp.support.progress import progress_bars

    options.check_files(arguments, json=".json", report=".html")
    if arguments.state is not None:
        check_state(arguments.state, STATE)
    if arguments.count < 2:
        raise InputError(
            f"count must be at least 2, not {arguments.count}: a Frechet distance compares sets of "
            "images"
        )
    sampler = options.check_sampling(arguments)
    file = arguments.statistics
    statistics = None if file is None else DatasetStatistics.load(file)
    name = arguments.features or _default_features(arguments.original, statistics)
    features = feature_network(name, device(arguments))
    if statistics is not None:
        statistics.check_features(features)
    original = load_pipeline(arguments.original, arguments)
    quantized = load_checkpoint(arguments.checkpoint, arguments)
    with progress_bars() as progress:
        found = compare(
            quantized, original=original, sampler=sampler, count=arguments.count,
            seed=arguments.seed, features=features, features_name=name, statistics=statistics,
            state=arguments.state, progress=progress,
        )  # fmt: skip
    report = None
    if arguments.report is not None:
        title = f"{arguments.checkpoint.absolute().name} against {Path(arguments.original).name}"
        report = _report(title, found, original, quantized)
    if arguments.json is not None:
        description = {"checkpoint": str(arguments.checkpoint), "original": arguments.original}
        values = description | {"features": name} | found.to_dict()
        options.write_text(arguments.json, json.dumps(values, indent=1) + "\n")
    if arguments.json != options.STANDARD_OUTPUT:
        _print(found)
    if report is not None:
        options.write_text(arguments.report, report)
    if arguments.state is not None:
        arguments.state.unlink(missing_ok=True)


def _default_features(original: str, statistics: DatasetStatistics | None) -> str:
    """Return the features of the statistics, else the default for the model."""
    return FEATURES.get(original, "pixels") if statistics is None else statistics.features


def _print(found: Comparison) -> None:
    """Print the table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for row in found.table():
        table.add_row(*row)
    Console().print(table)


def _report(
    title: str, found: Comparison, original: DiffusionPipeline, quantized: DiffusionPipeline
) -> str:
    """Return the HTML page."""
    from msfp.layers.base import quantized_networks
    from msfp.layers.selection import quantizable_layers
    from msfp.pipelines.denoiser import by_name, networks_of
    from msfp.reports.model_page import ModelReport

    plain = networks_of(original)
    layers = by_name(
        {name: plain[name] for name in quantized_networks(quantized)}, quantizable_layers
    )
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    return ModelReport(title, quantized, found.inputs, weights, found).html()
