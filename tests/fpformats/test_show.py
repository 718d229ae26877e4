import subprocess
import sys

import pytest

from fpformats import parse
from fpformats.__main__ import main
from fpformats.show import describe, number_line


def test_the_table_has_a_row_for_every_code():
    text = describe(parse("E2M1"))
    assert "FloatFormat(E2M1: 4 bits, signed, bias 1, max 6, finite only)" in text
    assert "  15  1 11 1  -6" in text.splitlines()
    assert len(text.split("value\n")[1].splitlines()) == 16


def test_specials_are_shown():
    rows = describe(parse("E5M2")).splitlines()
    assert rows[-1].endswith("nan")
    assert any(row.endswith("1 11111 00  -inf") for row in rows)


def test_the_line_is_to_scale():
    marks, ends = number_line(parse("E2M1U")).splitlines()
    places = [index for index, mark in enumerate(marks) if mark == "|"]
    assert [place / 12 for place in places] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert ends.split() == ["0", "6"]


def test_the_command_prints_the_description(capsys):
    assert main(["show", "E2M1U"]) == 0
    assert capsys.readouterr().out == describe(parse("E2M1U")) + "\n"


@pytest.mark.parametrize("name", ["E2M1X", "E8M23"])
def test_a_bad_name_is_one_sentence_and_exit_code_2(name, capsys):
    assert main(["show", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fpformats: ")
    assert captured.err.count("\n") == 1


def test_the_module_runs():
    command = [sys.executable, "-m", "fpformats", "show", "E1M1U"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert "E1M1U" in result.stdout


def test_notebooks_show_the_facts():
    text = parse("E8M0")._repr_html_()
    assert "<caption>E8M0</caption>" in text
    assert "<tr><th>largest</th><td>2**127</td></tr>" in text
    assert "<tr><th>zero</th><td>no</td></tr>" in text
