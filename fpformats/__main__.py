"""The command line: ``python -m fpformats show E2M1U``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from fpformats.names import parse
from fpformats.show import describe

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name; by default those of this process.

    Returns:
        The exit code: 0, or 2 where the format cannot be shown.
    """
    parser = argparse.ArgumentParser(prog="fpformats", description="Look at minifloat formats.")
    commands = parser.add_subparsers(required=True, metavar="command")
    show = commands.add_parser("show", help="print a format's facts, number line and codes")
    show.add_argument("format", help="a format name, such as E2M1U")
    name = parser.parse_args(arguments).format
    try:
        print(describe(parse(name)))
    except ValueError as error:
        print(f"fpformats: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
