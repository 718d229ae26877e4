"""Progress of long work: one protocol for all functions, and progress bars."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm.auto import tqdm

from msfp.support.checks import check_truth


class Progress(Protocol):
    """A callback that receives the progress of each stage of some work."""

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> object:
        """Receive a stage's name, its finished units, its total units, and optionally a note."""


def no_progress(_stage: str, _done: int, _total: int, _note: str = "", /) -> None:
    """Ignore the progress."""


_bars: dict[str, tqdm[Any]] = {}
_shows = True


def show_progress(enabled: bool) -> None:
    """Show bars while long functions run, as they do by default in terminals and notebooks, or not.

    Args:
        enabled: Whether to show them. `TQDM_DISABLE=1` in the environment turns them off, too.

    Raises:
        InputError: If `enabled` is neither True nor False.

    Example:
        >>> import msfp
        >>> msfp.show_progress(False)
    """
    global _shows
    check_truth("enabled", enabled)
    _shows = enabled


def shown_progress(stage: str, done: int, total: int, note: str = "", /) -> None:
    """Draw a bar for each stage, with the time left, where a person may be watching.

    Of several processes, as torchrun starts them, the first one draws.
    """
    if not _shows or os.environ.get("RANK", "0") != "0":
        return
    bar = _bars.get(stage)
    if bar is None or bar.total != total or bar.n > done:
        bar = _bars[stage] = tqdm(total=total, desc=stage, disable=None)  # silent in files
    bar.set_postfix_str(note, refresh=False)
    bar.update(done - bar.n)
    if done >= total:
        bar.close()
        del _bars[stage]


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
