"""Put the pictures and the table of a demo folder into the documentation.

python docs/render_demo.py msfp-demo
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PICTURES = ("images", "distribution", "errors", "errors_by_timestep", "routing")
HEADER = (
    "| method | noise-prediction error | paired PSNR, dB | Frechet distance | size, KB |\n"
    "|---|--:|--:|--:|--:|\n"
)


def table(results: dict[str, Any]) -> str:
    """Return the demo's table in Markdown."""
    lines = [HEADER]
    for row in results["rows"]:
        psnr = "same" if row["psnr"] is None else f"{row['psnr']:.1f}"
        error = f"{row['noise_error']:.4f}" if row["psnr"] is not None else "0"
        size = f"{row['bytes'] / 1000:.0f}"
        lines.append(f"| {row['method']} | {error} | {psnr} | {row['frechet']:.2f} | {size} |\n")
    return "".join(lines)


def main() -> None:
    """Copy the pictures, and replace what stands between the markers of each page."""
    demo = Path(sys.argv[1])
    results = json.loads((demo / "results.json").read_text())
    for name in PICTURES:
        shutil.copy(demo / "images" / f"{name}.png", DOCS / "pictures" / f"{name}.png")
    for page in (DOCS.parent / "README.md", DOCS / "quickstart.md"):
        text = page.read_text()
        pattern = r"(<!-- table -->\n).*?(<!-- end -->)"
        page.write_text(
            re.sub(pattern, lambda m: m[1] + table(results) + m[2], text, flags=re.DOTALL)
        )


if __name__ == "__main__":
    main()
