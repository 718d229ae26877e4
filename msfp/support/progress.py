"""Progress bars with time left, one for each stage of a long command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[str, int, int], None]
"""Called with a stage's name, the units of it that are done and their total."""


def counted(advance: Advance, stage: str, total: int) -> Callable[[int], None]:
    """Return a function of the units of a stage that were just done.

    Example:
        >>> done = counted(print, "sampling", 64)
        >>> done(16)
        sampling 16 64
        >>> done(16)
        sampling 32 64
    """
    done = 0

    def count(units: int) -> None:
        nonlocal done
        done += units
        advance(stage, done, total)

    return count


@contextmanager
def stages() -> Iterator[Advance]:
    """Yield a function of a stage's name, its units done and their total; bars go to stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield advance


@contextmanager
def noted_bar(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function of units done, their total and a note; the bar goes to stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, note="")

        def advance(done: int, total: int, note: str) -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield advance
