"""`msfp inspect`: print the table of a checkpoint's layers without reading its weights."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msfp.cli import options
from msfp.errors import InputError

if TYPE_CHECKING:
    from msfp.checkpoint.facts import LayerFacts, ProductFacts

WIDEST = 10_000
"""Width of a terminal, in columns, that fits every table."""
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
    from msfp.checkpoint.facts import (
        LayerFacts,
        ProductFacts,
        execution,
        in_order,
        matching,
        overview,
    )
    from msfp.checkpoint.inspection import inspect_coverage, inspect_layers, inspect_products
    from msfp.reports.layer_table import COLUMNS, PRODUCT_COLUMNS, cells, product_cells

    if arguments.json == arguments.csv == options.STANDARD_OUTPUT:
        raise InputError("json and csv must not both be -: standard output takes one of them")
    options.check_files(arguments, json=".json", csv=".csv")
    found: list[LayerFacts | ProductFacts] = [
        *in_order(inspect_layers(arguments.checkpoint), arguments.sort),
        *inspect_products(arguments.checkpoint),
    ]
    if arguments.filter is not None:
        found = matching(found, arguments.filter)
    if arguments.json is not None:
        options.write_text(arguments.json, _json(found))
    if arguments.csv is not None:
        options.write_text(arguments.csv, _csv(found))
    if options.STANDARD_OUTPUT in (arguments.json, arguments.csv):
        return
    layers = [each for each in found if isinstance(each, LayerFacts)]
    coverage = inspect_coverage(arguments.checkpoint)
    products = [each for each in found if isinstance(each, ProductFacts)]
    if layers:
        _print(COLUMNS, [cells(each) for each in layers])
        print(overview(layers))
        for sentence in [*execution(layers), *([] if coverage is None else coverage.sentences())]:
            print(sentence)
    if products:
        _print(PRODUCT_COLUMNS, [product_cells(each) for each in products])


def _print(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table; lines that are too long for the terminal are not wrapped."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = Console(width=WIDEST).measure(table).maximum
    Console(width=max(width, Console().width)).print(table)


def _json(facts: list[LayerFacts | ProductFacts]) -> str:
    """Return all facts as JSON, with every format that was tried."""
    return json.dumps([each.to_dict() | _choices(each) for each in facts], indent=1) + "\n"


def _choices(facts: LayerFacts | ProductFacts) -> dict[str, Any]:
    """Return the formats that were tried for a layer, if they were saved."""
    summary = getattr(facts, "summary", None)
    if summary is None:
        return {"weight_choices": {}, "input_choices": {}}
    return {"weight_choices": summary.weight_choices, "input_choices": summary.input_choices}


def _csv(facts: list[LayerFacts | ProductFacts]) -> str:
    """Return CSV with a header and a line for each layer and operand; unknown values are empty."""
    text = io.StringIO()
    rows = [each.to_dict() for each in facts]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
