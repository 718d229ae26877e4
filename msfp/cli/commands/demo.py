"""`msfp demo`: quantize the reference model by every method, and restore its image quality."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from msfp.cli.config_options import add_config, config_from
from msfp.cli.options import seed
from msfp.config import QuantizationConfig

TABLE_WIDTH = 100
"""Columns that the table needs; a narrower terminal wraps its lines."""
NOT_HERE = (
    "scheme", "include", "exclude", "first_layers", "last_layers", "granularity", "overrides",
    "refine", "attention_bits", "budget",
)  # fmt: skip
"""Config fields without an option: the methods set them, or this model does not need them."""


def add(commands: Any) -> None:
    """Describe the command."""
    demo = commands.add_parser("demo", help="quantize and recover the reference model; report")
    demo.add_argument("--output", type=Path, default=Path("msfp-demo"), help="a new folder")
    demo.add_argument("--quick", action="store_true", help="a small run of about two minutes")
    demo.add_argument("--seed", type=seed, default=0, metavar="N", help="of all that is random")
    add_config(demo, QuantizationConfig, "bits", skip=NOT_HERE)
    demo.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo with progress bars, print its table and write its folder."""
    from rich.console import Console

    from msfp.experiments.demo import bench, report
    from msfp.experiments.demo.results import FULL, QUICK, findings
    from msfp.support.files import atomic_folder, check_output
    from msfp.support.progress import progress_bars

    check_output(arguments.output)
    settings = QUICK if arguments.quick else FULL
    config = config_from(arguments, QuantizationConfig)
    started = time.perf_counter()
    with progress_bars() as progress:
        results = bench.run(config, settings, arguments.seed, progress)
    with atomic_folder(arguments.output) as folder:
        report.write(results, folder)
    console = Console()
    console = Console(width=max(console.width, TABLE_WIDTH))
    console.print(report.terminal_table(results))
    for sentence in findings(results):
        console.print(f"- {sentence}")
    minutes = (time.perf_counter() - started) / 60
    console.print(f"Took {minutes:.1f} minutes. Report: {arguments.output / 'report.html'}")
