"""`msfp evaluate`: a packed checkpoint against the full-precision pipeline, at equal seeds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msfp.cli.commands import options

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from msfp.evaluation.comparison import Comparison
    from msfp.evaluation.dataset_statistics import ReferenceStatistics


def add(commands: Any) -> None:
    """Describe the command."""
    evaluate = commands.add_parser(
        "evaluate", help="compare a quantized checkpoint with its full-precision pipeline"
    )
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument(
        "--against", required=True, metavar="MODEL",
        help=f"the full-precision pipeline folder, or {options.REFERENCE!r}",
    )  # fmt: skip
    options.add_features(evaluate)
    evaluate.add_argument(
        "--reference", type=Path, metavar="FILE",
        help="statistics of a data set, from msfp statistics, to measure the distance from as well",
    )  # fmt: skip
    evaluate.add_argument(
        "--json", type=Path, metavar="FILE", help="a new .json file, or - for standard output"
    )
    options.add_report(evaluate)
    options.add_state(evaluate)
    # Other noise than that of calibration.
    options.add_sampling(evaluate, count=64, first_seed=1000)
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compare, print a table, and write what was asked for."""
    from msfp.errors import InputError
    from msfp.evaluation.comparison import compare
    from msfp.evaluation.dataset_statistics import ReferenceStatistics
    from msfp.evaluation.features import feature_network
    from msfp.evaluation.fingerprint import KIND
    from msfp.support.autosave import check_state
    from msfp.support.progress import stages

    options.check_files(arguments, json=".json", report=".html")
    if arguments.state is not None:
        check_state(arguments.state, KIND)
    if arguments.count < 2:
        raise InputError("count must be at least 2: a Frechet distance is one between sets")
    sampler = options.check_sampling(arguments)
    reference = (
        None if arguments.reference is None else ReferenceStatistics.load(arguments.reference)
    )
    name = arguments.features or _default_features(arguments, reference)
    features = feature_network(name, options.device(arguments))
    if reference is not None:
        reference.check_features(features)
    full = options.load_pipeline(arguments.against, arguments)
    quantized = options.load_checkpoint(arguments.checkpoint, arguments)
    with stages() as advance:
        found = compare(
            full, quantized, sampler, count=arguments.count, seed=arguments.seed,
            features=features, reference=reference, state=arguments.state, advance=advance,
        )  # fmt: skip
    report = None if arguments.report is None else _report(arguments, found, full, quantized, name)
    if arguments.json is not None:
        description = {"checkpoint": str(arguments.checkpoint), "against": arguments.against}
        values = description | {"features": name} | found.to_dict()
        options.write_text(arguments.json, json.dumps(values, indent=1) + "\n")
    if arguments.json != options.STANDARD_OUTPUT:
        _print(found, name)
    if report is not None:
        options.write_text(arguments.report, report)
    if arguments.state is not None:
        arguments.state.unlink(missing_ok=True)


def _default_features(arguments: argparse.Namespace, reference: ReferenceStatistics | None) -> str:
    """Return the features of the reference, or else what suits the model."""
    if reference is not None:
        return reference.features
    return "digits" if arguments.against == options.REFERENCE else "pixels"


def _print(found: Comparison, features: str) -> None:
    """Print the table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for row in found.table(features):
        table.add_row(*row)
    Console().print(table)


def _report(
    arguments: argparse.Namespace,
    found: Comparison,
    full: DiffusionPipeline,
    quantized: DiffusionPipeline,
    features: str,
) -> str:
    """Return the HTML page."""
    from msfp.pipelines.denoiser import denoiser_of, quantizable_layers
    from msfp.reports.model_page import ModelReport

    layers = quantizable_layers(denoiser_of(full))
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    title = f"{arguments.checkpoint.absolute().name} against {Path(arguments.against).name}"
    return ModelReport(title, denoiser_of(quantized), found.inputs, weights, found, features).html()
