"""Commands in the docs have the options that they name."""

import argparse
import re
from pathlib import Path

import pytest

from msfp.cli.main import parser

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
COMMAND = re.compile(r"(?:msfp|msfp\.cli\.main) ([a-z]+)\b([^\n`]*)")


def options():
    """Options of each command, by its name."""
    (commands,) = (
        action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return {
        name: {word for action in each._actions for word in action.option_strings}
        for name, each in commands.choices.items()
    }


def used(page):
    """Commands of msfp on a page, with their options; the changelog has old ones."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    known = options()
    return [
        (match[0], match[1], re.findall(r"(?<!\S)--[a-z][a-z-]*", match[2]))
        for match in COMMAND.finditer(text)
        if match[1] in known and page.name != "changelog.md"
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_commands_exist(page):
    known = options()
    for command, name, words in used(page):
        assert set(words) <= known[name], command


def test_commands_are_found():
    assert sum(len(used(page)) for page in PAGES) > 20
