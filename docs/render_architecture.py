"""Draw the rooms of both packages from their imports: `python docs/render_architecture.py`.

The floors are those that pyproject.toml gives the import linter. The purpose of a room is the first
line of its docstring. What a room uses is what its files import.
"""

import ast
import html
import textwrap
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import grimp

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pictures" / "architecture.svg"
PACKAGES = {
    "msfp": ("#c2410c", "knows layers, denoisers and samplers"),
    "fpformats": ("#0f766e", "knows numbers"),
}
"""From the top down, with the colour of each and what it knows."""
WIDTH, MARGIN, HEAD, LINE, GAP = 600, 20, 54, 16, 8
"""Of the picture, in its units: heading of a package, line of a box, what is between boxes."""
LETTERS = 92
"""Letters in a line of a box."""


class Room(NamedTuple):
    """A room, or a module that is no package."""

    name: str
    purpose: str
    uses: list[str]


def contracts() -> list[dict[str, Any]]:
    """Return the contracts of the import linter."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    found: list[dict[str, Any]] = settings["contracts"]
    return found


def floors(package: str) -> list[str]:
    """Return the rooms of a package from the top floor down."""
    layers = next(each["layers"] for each in contracts() if each.get("containers") == [package])
    return [name.strip() for layer in layers for name in layer.split("|")]


def exceptions() -> set[tuple[str, ...]]:
    """Return the pairs of modules whose imports do not count."""
    ignored = {each for contract in contracts() for each in contract.get("ignore_imports", ())}
    return {tuple(each.split(" -> ")) for each in ignored}


def purpose(package: str, room: str) -> str:
    """Return the first line of the docstring of a room or module."""
    file = ROOT / package / room / "__init__.py"
    file = file if file.exists() else ROOT / package / f"{room}.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0]


def rooms(graph: grimp.ImportGraph, package: str) -> list[Room]:
    """Return the rooms of a package, from the top floor down."""
    order = floors(package)
    return [Room(name, purpose(package, name), uses(graph, package, name, order)) for name in order]


def uses(graph: grimp.ImportGraph, package: str, room: str, order: list[str]) -> list[str]:
    """Return what the files of a room import of both packages, from the top floor down."""
    files = {f"{package}.{room}", *graph.find_descendants(f"{package}.{room}")}
    ignored = exceptions()
    imported = {
        each
        for file in files
        for each in graph.find_modules_directly_imported_by(file)
        if (file, each) not in ignored
    }
    found = {each.split(".")[1] for each in imported if each.startswith(f"{package}.")} - {room}
    other = [] if all(each.startswith(f"{package}.") for each in imported) else ["fpformats"]
    return [name for name in order if name in found] + other


def drawing() -> str:
    """Return the picture as SVG."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    parts, top = [], MARGIN
    for package, (colour, knows) in PACKAGES.items():
        parts += heading(package, knows, colour, top)
        top += HEAD
        for room in rooms(graph, package):
            lines = box(room, top, colour)
            parts += lines
            top += LINE * len(lines) + GAP
        top += MARGIN
    label = "Rooms of msfp and fpformats; each imports itself and what is below it"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" '
            f'font-family="system-ui, sans-serif" role="img" aria-label="{label}">',
            f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def heading(package: str, knows: str, colour: str, top: int) -> list[str]:
    """Return the name of a package, and what it knows."""
    return [
        text(MARGIN, top + 30, package, 22, colour, 700),
        text(MARGIN + 13 * len(package) + 14, top + 30, knows, 15, "#52606d"),
    ]


def box(room: Room, top: int, colour: str) -> list[str]:
    """Return a room as a box with its purpose and what it uses, as many parts as it has lines."""
    used = textwrap.wrap(f"uses {', '.join(room.uses) or 'nothing'}", LETTERS)
    words = [*textwrap.wrap(room.purpose.replace("``", ""), LETTERS), *used]
    height = LINE * (len(words) + 2)
    return [
        f'<rect x="{MARGIN}" y="{top}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="7" '
        f'fill="{colour}" fill-opacity="0.08" stroke="{colour}" stroke-opacity="0.45"/>',
        text(MARGIN + 12, top + 20, room.name, 15, "#1f2933", 600),
        *[
            text(
                MARGIN + 12,
                top + 21 + LINE * number,
                line,
                12,
                "#52606d" if line in used else "#1f2933",
            )
            for number, line in enumerate(words, start=1)
        ],
    ]


def text(x: int, y: int, words: str, size: int, colour: str, weight: int = 400) -> str:
    """Return a line of text."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{colour}">'
        f"{html.escape(words)}</text>"
    )


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
