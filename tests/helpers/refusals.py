"""How the command line refuses what it cannot use."""

import re

from msfp.cli.main import main


def assert_refused(arguments, message, folder, capsys):
    """One sentence that matches, exit code two, and a folder left as it was."""
    before = sorted(folder.rglob("*"))
    try:
        code = main([str(word) for word in arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(message, error.strip().splitlines()[-1])
    assert "Traceback" not in error
    assert sorted(folder.rglob("*")) == before
