"""The command line `msfp`: its commands are in msfp.cli.commands.

No command imports torch or diffusers before it runs, so that help and usage errors appear at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from msfp.cli.commands import (
    demo,
    evaluate,
    finetune,
    inspect,
    quantize,
    sample,
    statistics,
    study,
)
from msfp.errors import InputError
from msfp.version import __version__

COMMANDS = (demo, quantize, finetune, sample, inspect, statistics, evaluate, study)
WRITTEN = ("output", "state", "report", "json", "csv", "calibration")
"""Arguments that name the outputs of a command."""


class _Parser(argparse.ArgumentParser):
    """A parser that accepts only unabbreviated options, and so do the parsers of its commands."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False} | options)  # type: ignore[arg-type]


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = _Parser(prog="msfp", description="4-bit floating-point diffusion models.")
    top.add_argument("--version", action="version", version=f"msfp {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _left_behind(arguments: argparse.Namespace) -> str:
    """Return a sentence on the complete files and folders that an interrupted command left."""
    folder = getattr(arguments, "folder", None)
    if folder is not None and folder.exists():
        return f"{folder} holds the finished images; run the same command to resume"
    paths = [path for name in WRITTEN if isinstance(path := getattr(arguments, name, None), Path)]
    there = [str(path) for path in paths if path.exists()]
    if not there:
        return "nothing was written"
    return f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} saved"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 for success, 1 if the reader of the output has closed it, 2 for unusable
        input, 130 if interrupted.
    """
    arguments = parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        from msfp.support.malloc import keep_memory

        keep_memory()
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except InputError as error:
        print(f"msfp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"msfp: interrupted; {_left_behind(arguments)}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
