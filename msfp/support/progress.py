"""Progress of long work: one protocol for all functions, and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A callback that receives the progress of each stage of some work."""

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> object:
        """Receive a stage's name, its finished units, its total units, and optionally a note."""


def no_progress(_stage: str, _done: int, _total: int, _note: str = "", /) -> None:
    """Ignore the progress."""


def counted(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Return a function to call with the number of units of a stage just finished.

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
        progress(stage, done, total)

    return count


def of_part(progress: Progress, part: str) -> Progress:
    """Return a callback that adds the name of a part to each stage's name.

    Example:
        >>> of_part(print, "held out")("recording", 1, 4)
        recording held out 1 4
    """

    def tell(stage: str, done: int, total: int, note: str = "", /) -> object:
        return progress(f"{stage} {part}", done, total, note)

    return tell


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Yield a callback that draws a bar for each stage on stderr, with the time left.

    Example:
        >>> with progress_bars() as progress:
        ...     progress("sampling", 64, 64)
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def draw(stage: str, done: int, total: int, note: str = "", /) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield draw
