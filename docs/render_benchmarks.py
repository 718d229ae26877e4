"""Put the ratios of a benchmark run into the page on speed, as tables and a picture.

pytest tests/benchmarks --benchmark-enable --benchmark-json kernels.json
python docs/render_benchmarks.py kernels.json
"""

import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
PAGE = DOCS / "performance.md"
WHATS = ("x a copy", "x fpformats")


def by_table(run: dict[str, Any], table: str) -> list[dict[str, Any]]:
    """Return the records of a table, in the order of the run."""
    records = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
    return [record for record in records if record.get("table") == table]


def passes(run: dict[str, Any]) -> str:
    """Return ratios to a copy, by operation, instruction set and size."""
    records = by_table(run, "passes")
    heads = [f"{r['backend']}, {r['size']:.0e}".replace("e+0", "e") for r in records]
    lines = ["| operation | " + " | ".join(heads) + " |", "|---" + "|--:" * len(heads) + "|"]
    for name in records[0]["ratios"]:
        if name != "copy":
            cells = [f"{record['ratios'][name]:.2f}" for record in records]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    copies = [f"{record['microseconds']['copy']:.0f} us" for record in records]
    lines.append("| a copy took | " + " | ".join(copies) + " |")
    return "\n".join(lines)


def peers(run: dict[str, Any]) -> str:
    """Return ratios to a copy and to the kernel here, by library and number of elements."""
    records = by_table(run, "peers")
    sizes = sorted({record["size"] for record in records})
    heads = [f"{what}, {size:.0e}".replace("e+0", "e") for size in sizes for what in WHATS]
    lines = ["| | " + " | ".join(heads) + " |", "|---" + "|--:" * len(heads) + "|"]
    for name in dict.fromkeys(list(record["ratios"])[-1] for record in records):
        cells = []
        for size in sizes:
            (ratios,) = (r["ratios"] for r in records if r["size"] == size and name in r["ratios"])
            cells += [f"{ratios[name]:.0f}", f"{ratios[name] / ratios['fpformats']:.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name in ("fpformats, whole-array", "fpformats"):
        cells = []
        for size in sizes:
            ratios = next(r["ratios"] for r in records if r["size"] == size)
            cells += [f"{ratios[name]:.2f}", f"{ratios[name] / ratios['fpformats']:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def calls(run: dict[str, Any]) -> str:
    """Return the time of one call on ten thousand elements."""
    (record,) = by_table(run, "call")
    times = record["microseconds"]
    lines = ["| 10,000 elements, new result | us |", "|---|--:|"]
    return "\n".join([*lines, *(f"| {name} | {times[name]:.1f} |" for name in times)])


def searches(run: dict[str, Any]) -> str:
    """Return how often faster the search is than a loop that quantizes."""
    lines = ["| search | loop in torch, ms | search, ms | faster |", "|---|--:|--:|--:|"]
    for record in by_table(run, "search"):
        loop, search = (record["microseconds"][name] / 1e3 for name in ("loop", "search"))
        lines.append(f"| {record['title']} | {loop:.0f} | {search:.1f} | {loop / search:.0f} x |")
    return "\n".join(lines)


def picture(run: dict[str, Any]) -> None:
    """Draw the ratios of all libraries, on a logarithmic axis."""
    records = [record for record in by_table(run, "peers") if record["size"] == 1_000_000]
    bars: dict[str, float] = {
        list(r["ratios"])[-1]: list(r["ratios"].values())[-1] for r in records
    }
    own = records[0]["ratios"]
    bars |= {"fpformats, whole-array": own["fpformats, whole-array"], "fpformats": own["fpformats"]}
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    names = sorted(bars, key=bars.__getitem__, reverse=True)
    colors = ["tab:blue" if name.startswith("fpformats") else "silver" for name in names]
    drawn = axes.barh(names, [bars[name] for name in names], color=colors)
    axes.bar_label(drawn, [f"{bars[name]:.3g}" for name in names], padding=3)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlim=(0.5, 1500), xlabel="time, as multiple of copying the same tensor")
    axes.set_title("Rounding a million float32 values, one thread", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "pictures" / "speed.png", dpi=150)


def machine(run: dict[str, Any]) -> str:
    """Return what the run was made on."""
    info = run["machine_info"]
    cpu = info["cpu"].get("brand_raw", platform.processor())
    import torch

    versions = f"Python {info['python_version']}, torch {torch.__version__}"
    return f"Measured on one thread of an {cpu}, {versions}."


def main() -> None:
    """Replace what stands between the markers of the page by what the run has."""
    run = json.loads(Path(sys.argv[1]).read_text())
    text = PAGE.read_text()
    tables = {"call": calls, "passes": passes, "peers": peers, "search": searches}
    for make in (machine, *(make for name, make in tables.items() if by_table(run, name))):
        pattern = rf"(?<=<!-- {make.__name__} -->\n).*?(?=<!-- end -->)"
        content = f"{make(run)}\n".replace("\\", r"\\")
        text = re.sub(pattern, content, text, flags=re.DOTALL)
    PAGE.write_text(text)
    if by_table(run, "peers"):
        picture(run)


if __name__ == "__main__":
    main()
