"""Processes that fine-tune, forked from one that has imported everything, which takes seconds."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.multiprocessing import start_processes

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["run_training"])


class Script:
    """A process that runs `run_training.main` with arguments in an environment of its own."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.errors = folder.with_name(f"{folder.name}.errors")
        words = [str(folder), *arguments]
        self.process = SERVER.Process(target=_run, args=(words, environment, self.errors))
        with _server_settings():
            self.process.start()

    def kill(self) -> int | None:
        """End it without warning; return its exit code."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def finish(self) -> None:
        """Wait until it has ended well."""
        self.process.join(timeout=300)
        assert self.process.exitcode == 0, self.errors.read_text()


def forked(function: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """Run a function of a rank and arguments in several processes, and wait until they end well."""
    with _server_settings():
        start_processes(function, arguments, nprocs=processes, start_method="forkserver")


def _server_settings() -> AbstractContextManager[Any]:
    """The environment of the server, which the first process starts.

    It must not make threads before it forks, and it must find what it imports: Python 3.11 does not
    tell it where.
    """
    path = os.pathsep.join(each for each in sys.path if each)
    return patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path)


def _run(words: list[str], environment: dict[str, str], errors: Path) -> None:
    import run_training

    os.environ.update(environment)
    sys.argv = ["run_training", *words]
    with errors.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    run_training.main()
