"""One self-contained HTML page: text, tables and pictures, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2933; background: #fff;
       max-width: 62rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; } h2 { margin-top: 2.6rem; font-size: 1.3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #e4e7eb; }
th { border-bottom: 2px solid #1f2933; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
table.sortable th { cursor: pointer; position: sticky; top: 0; background: #fff; }
table.sortable td { white-space: nowrap; }
.scroll { overflow-x: auto; max-height: 32rem; }
img { max-width: 100%; height: auto; } figure { margin: 1.2rem 0; }
figcaption, .note { color: #52606d; font-size: .92rem; }
"""


SCRIPT = """
for (const head of document.querySelectorAll("table.sortable th")) head.onclick = () => {
  const rows = [...head.closest("table").rows].slice(1), column = head.cellIndex;
  const down = head.dataset.down = head.dataset.down === "no" ? "yes" : "no";
  const text = row => row.cells[column].textContent;
  const order = (a, b) => a - b || a.localeCompare(b, undefined, {numeric: true});
  rows.sort((a, b) => !text(a) - !text(b) || (down === "yes" ? -1 : 1) * order(text(a), text(b)));
  head.closest("tbody").append(...rows);
};
"""
"""Sorts a table by the clicked column; another click reverses the order. Empty cells come last."""


def png(picture: Figure) -> bytes:
    """Return a figure as PNG bytes."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def image(picture: bytes, caption: str) -> str:
    """Return a PNG as an HTML figure with embedded data."""
    data = base64.b64encode(picture).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, sortable: bool = False) -> str:
    """Return an HTML table; the first column is a label, the others are numbers."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><tr>{head}</tr>{body}</table></div>'


def paragraph(text: str, *, note: bool = False) -> str:
    """Return a paragraph of plain text."""
    return f"<p{' class=note' if note else ''}>{html.escape(text)}</p>"


def bullets(sentences: Sequence[str]) -> str:
    """Return sentences as an HTML list."""
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>"


def page(heading: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a whole page from its heading and its sections' HTML parts."""
    title = html.escape(heading)
    body = "".join(
        (f"<h2>{html.escape(name)}</h2>" if name else "") + "".join(parts)
        for name, parts in sections
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{body}<script>{SCRIPT}</script></body></html>\n"
    )
