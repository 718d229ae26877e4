"""The direction of imports, and what stands at the roots of the packages."""

import ast
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
PACKAGES = ("fpformats", "msfp")


def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]


def test_imports_go_down_the_floors_and_never_in_circles(capsys):
    code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert code == 0, capsys.readouterr().out


def test_the_methods_of_a_format_are_the_one_exception():
    ignored = {each for one in settings()["contracts"] for each in one.get("ignore_imports", ())}
    assert ignored == {"fpformats.formats -> fpformats.ops.elementwise"}


def test_the_root_of_msfp_holds_what_all_share_and_rooms():
    files = {each.name for each in (ROOT / "msfp").iterdir() if each.is_file()}
    assert files == {
        "__init__.py", "__init__.pyi", "config.py", "errors.py", "py.typed", "version.py",
    }  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_are_entered_by_their_files(package):
    for file in (ROOT / package).rglob("*/__init__.py"):
        (docstring,) = ast.parse(file.read_text()).body
        assert isinstance(docstring, ast.Expr), f"{file} must hold a docstring alone"
