"""New processes, forked from one that has imported everything, which takes seconds."""

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.multiprocessing import start_processes

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["run_training", "elsewhere"])


class Script:
    """A process that runs the `main` of a module with arguments in an environment of its own.

    What it prints is in the file `printed`, beside the folder that it is named after.
    """

    def __init__(
        self, folder: Path, *arguments: str, module: str = "run_training", **environment: str
    ) -> None:
        self.printed = folder.with_name(f"{folder.name}.printed")
        words = [str(folder), *arguments] if module == "run_training" else [*arguments]
        self.process = SERVER.Process(target=_run, args=(module, words, environment, self.printed))
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
        assert self.process.exitcode == 0, self.printed.read_text()


def pair(folders: Sequence[Path], *arguments: str, module: str = "run_training") -> list[Script]:
    """Run a module in two processes that train together, one for each folder, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    scripts = [
        Script(folder, *arguments, module=module, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank, folder in enumerate(folders)
    ]
    for script in scripts:
        script.finish()
    return scripts


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


def _run(module: str, words: list[str], environment: dict[str, str], printed: Path) -> None:
    os.environ.update(environment)
    sys.argv = [module, *words]
    with printed.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.exit(importlib.import_module(module).main())
