import re

from pages import DOCS

ROOT = DOCS.parent


def recipes():
    """The paragraphs that begin with a bold change, by that change."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"^\*\*(.+?)\*\*(.*?)(?=\n\n)", text, flags=re.MULTILINE | re.DOTALL)
    return {
        change: set(re.findall(r"`((?:msfp|fpformats)/[\w/]+\.\w+)`", how)) for change, how in found
    }


def test_each_change_is_at_home_in_two_files_that_are_there():
    found = recipes()
    assert len(found) == 12
    for change, files in found.items():
        assert len(files) <= 2, change
        for file in files:
            assert (ROOT / file).is_file(), file
