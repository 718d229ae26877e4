"""`msfp inspect`: the table of a checkpoint's layers, read without its weights."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msfp.commands import options

if TYPE_CHECKING:
    from msfp.inspection import LayerFacts

WIDEST = 10_000
"""Columns of a terminal in which no table is broken."""
ORDERS = ("model", "layer", "weight_sqnr", "input_sqnr", "cost_of_other_sign", "bytes")


def add(commands: Any) -> None:
    """Describe the command."""
    inspect = commands.add_parser("inspect", help="show what each layer of a checkpoint is")
    inspect.add_argument("checkpoint", type=Path)
    inspect.add_argument(
        "--sort", choices=ORDERS, default="model",
        help="decibels from the smallest on, bytes from the largest (default: as in the model)",
    )  # fmt: skip
    inspect.add_argument("--filter", metavar="GLOB", help="layers or modules to show")
    for name in ("json", "csv"):
        inspect.add_argument(
            f"--{name}", type=Path, metavar="FILE",
            help=f"a new .{name} file, or - for standard output, which then has no table",
        )  # fmt: skip
    inspect.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table, or write it as JSON or CSV."""
    from msfp.inspection import in_order, inspect_layers, matching

    options.check_files(arguments, json=".json", csv=".csv")
    facts = inspect_layers(arguments.checkpoint)
    if arguments.filter is not None:
        facts = matching(facts, arguments.filter)
    facts = in_order(facts, arguments.sort)
    if arguments.json is not None:
        options.write_text(arguments.json, _json(facts))
    if arguments.csv is not None:
        options.write_text(arguments.csv, _csv(facts))
    if options.STANDARD_OUTPUT not in (arguments.json, arguments.csv):
        _print(facts)


def _print(facts: list[LayerFacts]) -> None:
    """Print the table and its sums; a line that is too long for the terminal is not broken."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from msfp.inspection import COLUMNS, cells, overview

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for each in facts:
        table.add_row(*cells(each))
    width = Console(width=WIDEST).measure(table).maximum
    Console(width=max(width, Console().width)).print(table)
    print(overview(facts))


def _json(facts: list[LayerFacts]) -> str:
    """Return all that is known, with every format that was tried."""
    rows = [
        each.to_dict()
        | {
            "weight_choices": {} if each.summary is None else each.summary.weight_choices,
            "input_choices": {} if each.summary is None else each.summary.input_choices,
        }
        for each in facts
    ]
    return json.dumps(rows, indent=1) + "\n"


def _csv(facts: list[LayerFacts]) -> str:
    """Return a line for each layer below a line of names; what is not known is empty."""
    text = io.StringIO()
    rows = [each.to_dict() for each in facts]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
