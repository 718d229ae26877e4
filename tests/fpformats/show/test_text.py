import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpformats import exact, parse
from fpformats.__main__ import main
from fpformats.show.csv_table import csv, hexadecimal
from fpformats.show.figures import plot_grid, plot_rounding
from fpformats.show.text import compare, describe, number_line


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


@pytest.mark.parametrize("name", ["E2M1X", "E8M23", "E2M1B5000", "E2M1BN5000", "E99999999999M2"])
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


def test_output_that_nobody_reads_is_no_error():
    command = [sys.executable, "-m", "fpformats", "show", "E2M1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # noqa: S603
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_rounding_is_drawn_of_one_format(capsys, tmp_path):
    words = ["plot", "E2M1", "E3M0", "--rounding", "ToOdd", "--output", str(tmp_path / "no.png")]
    assert main(words) == 2
    assert "--rounding draws one format, and 2 are given" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_notebooks_show_the_facts():
    text = parse("E8M0")._repr_html_()
    assert "<caption>E8M0</caption>" in text
    assert "<tr><th>largest</th><td>2**127</td></tr>" in text
    assert "<tr><th>zero</th><td>no</td></tr>" in text


def test_formats_are_compared_on_one_scale():
    lines = compare([parse("E2M1"), parse("E3M0")]).splitlines()
    assert lines[0].split() == ["E2M1", "E3M0"]
    assert lines[3].split() == ["largest", "6", "16"]
    marks = lines[lines.index("E2M1") + 1]
    assert marks.index("|") == round(10 / 32 * 72)
    assert lines[-1].split() == ["-16", "16"]


@pytest.mark.parametrize("name", ["E2M1", "E5M2", "E4M3FNUZ", "E2M2UNS", "Binary6p2ue", "E8M0"])
def test_csv_tables_read_back_as_the_definition(name):
    fmt = parse(name)
    header, *rows = csv(fmt).splitlines()
    assert header == "codepoint,value,subnormal"
    assert len(rows) == fmt.code_count
    for code, row in enumerate(rows):
        point, text, subnormal = row.split(",")
        value, expected = float.fromhex(text), float(exact.decode(code, fmt))
        assert int(point, 16) == code
        assert value == expected or (math.isnan(value) and math.isnan(expected))
        assert math.isnan(value) or math.copysign(1, value) == math.copysign(1, expected)
        if fmt.smallest_subnormal:
            assert (subnormal == "*") == (0 < abs(expected) < fmt.smallest_normal)
        else:
            assert subnormal == ""


def test_csv_tables_of_formats_beyond_float64():
    rows = csv(parse("Binary13p1se")).splitlines()
    assert rows[2] == "0x0001,0x1p-2047,"
    assert rows[-1] == "0x1fff,-Inf,"
    with pytest.raises(ValueError, match="E8M23IEEE has 32 bits"):
        csv(parse("FP32"))


@given(st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x != 0))
def test_hexadecimal_is_that_of_c(x):
    assert float.fromhex(hexadecimal(Fraction(x))) == x


def test_pictures_are_written(tmp_path, capsys):
    grid = plot_grid([parse("E2M1"), parse("E3M0"), parse("E8M0")], tmp_path / "grid.png")
    steps = plot_rounding(parse("E2M1U"), tmp_path / "steps.png", ["TowardZero", "ToOdd"])
    for path in (grid, steps):
        assert path.read_bytes().startswith(b"\x89PNG")
    output = str(tmp_path / "again.png")
    assert main(["plot", "E2M1", "--output", output, "--rounding", "TowardZero"]) == 0
    assert capsys.readouterr().out == output + "\n"
    with pytest.raises(ValueError, match="at least one format, each of at most 10 bits"):
        plot_grid([parse("FP16")], tmp_path / "no.png")


def test_the_other_commands_print(capsys):
    assert main(["compare", "E2M1", "E3M0"]) == 0
    assert capsys.readouterr().out == compare([parse("E2M1"), parse("E3M0")]) + "\n"
    assert main(["csv", "E2M1"]) == 0
    assert capsys.readouterr().out == csv(parse("E2M1"))
