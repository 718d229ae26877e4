"""Processes that fine-tune, forked from one that has imported everything, which takes seconds."""

import multiprocessing
import os
import sys
from pathlib import Path
from unittest.mock import patch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["run_training"])


class Script:
    """A process that runs `run_training.main` with arguments in an environment of its own."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.errors = folder.with_name(f"{folder.name}.errors")
        words = [str(folder), *arguments]
        self.process = SERVER.Process(target=_run, args=(words, environment, self.errors))
        # The first to ask starts the server, which must not make threads before it forks.
        with patch.dict(os.environ, OMP_NUM_THREADS="1"):
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


def _run(words: list[str], environment: dict[str, str], errors: Path) -> None:
    import run_training

    os.environ.update(environment)
    sys.argv = ["run_training", *words]
    with errors.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    run_training.main()
