"""The command line: ``python -m fpformats show E2M1U``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from fpformats.parsing import parse
from fpformats.show.csv_table import csv
from fpformats.show.text import compare, describe

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program name; by default those of this process.

    Returns:
        The exit code: 0 on success, 1 if the reader closed the output early, 2 if a format cannot
        be shown.
    """
    options = _parser().parse_args(arguments)
    try:
        text = _run(options)
    except (OSError, OverflowError, ValueError) as error:
        print(f"fpformats: {error}", file=sys.stderr)
        return 2
    try:
        print(text, end="" if text.endswith("\n") else "\n", flush=True)
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    return 0


def _run(options: argparse.Namespace) -> str:
    formats = [parse(name) for name in options.formats]
    if options.command == "show":
        return describe(formats[0])
    if options.command == "compare":
        return compare(formats)
    if options.command == "csv":
        return csv(formats[0])
    from fpformats.show.figures import plot_grid, plot_rounding

    if options.rounding and len(formats) > 1:
        raise ValueError(f"--rounding draws one format, and {len(formats)} are given")
    if options.rounding:
        return str(plot_rounding(formats[0], options.output, options.rounding))
    return str(plot_grid(formats, options.output))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fpformats", description="Look at minifloat formats.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    helps = {
        "show": "print a format's facts, number line and codes",
        "compare": "print formats side by side",
        "csv": "print all codes with their exact values, as CSV",
        "plot": "draw the values of formats, or with --rounding what numbers round to, as PNG",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        many = name in ("compare", "plot")
        count = "+" if many else 1
        command.add_argument("formats", nargs=count, help="a format name, such as E2M1U")
        if name == "plot":
            command.add_argument("--output", default="formats.png", help="the file to write")
            command.add_argument(
                "--rounding", action="append", help="a rounding mode; may be repeated"
            )
    return parser


if __name__ == "__main__":
    sys.exit(main())
