"""`msfp study`: run quantization recipes on the reference models, with several seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Describe the command."""
    study = commands.add_parser(
        "study", help="measure recipes on the reference models; resumes where it was stopped"
    )
    study.add_argument(
        "--output", type=Path, default=Path("msfp-study"),
        help="a folder, new or of a study to resume (default: msfp-study)",
    )  # fmt: skip
    study.add_argument(
        "--rows", action="append", metavar="GLOB",
        help="names MODEL/TRAINING/RECIPE/BITS/SAMPLER-STEPS/SEED; can be repeated (default: "
        "all of the models that are there)",
    )  # fmt: skip
    study.add_argument(
        "--models", type=Path, metavar="DIR",
        help="independently trained models: DIR/1 and DIR/2 as the training script writes them",
    )  # fmt: skip
    study.add_argument("--list", action="store_true", help="print the rows that are missing")
    study.add_argument("--render", action="store_true", help="only write the tables and plots")
    study.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the rows that have no record, then write tables and plots."""
    from msfp.errors import InputError
    from msfp.experiments.study.benchmark_models import has_model
    from msfp.experiments.study.render import render
    from msfp.experiments.study.run import chosen_rows, missing_rows, run_rows, valid_records
    from msfp.experiments.study.store import Store
    from msfp.support.progress import progress_bars

    if arguments.output.exists() and not arguments.output.is_dir():
        raise InputError(f"output {arguments.output} must be a folder")
    store = Store(arguments.output)
    rows = missing_rows(chosen_rows(arguments.rows or ["*"]), store)
    if arguments.rows is None:
        rows = [row for row in rows if has_model(row.model, row.training, arguments.models)]
    if arguments.list:
        print("\n".join(row.name for row in rows))
        return
    if not arguments.render and rows:
        with progress_bars() as progress:
            run_rows(rows, arguments.output, arguments.models, progress)
    if not store.records():
        raise InputError(f"output {arguments.output} has no results.jsonl to render")
    valid, count = len(valid_records(store)), len(store.records())
    others = f" ({count - valid} of other settings are left out)" if valid < count else ""
    print(f"{valid} rows{others}: {render(arguments.output)}")
