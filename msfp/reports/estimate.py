"""An estimate of a quantization in words and tables of at most 80 columns."""

from __future__ import annotations

import textwrap
from pathlib import Path

from msfp.ptq.estimate import Estimate
from msfp.support.memory import available_bytes, free_disk

WIDTH = 80
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
TIMES = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))


def size(number: float) -> str:
    """Return a number of bytes with two or three digits.

    Example:
        >>> size(3.44e9), size(12_345), size(0)
        ('3.4 GB', '12 kB', '0 B')
    """
    unit, name = next(((u, n) for u, n in UNITS if number >= u), UNITS[-1])
    return f"{_short(number / unit)} {name}"


def duration(seconds: float) -> str:
    """Return a time with two or three digits.

    Example:
        >>> duration(0.2), duration(75), duration(2.5 * 3600)
        ('0.2 s', '1.2 min', '2.5 h')
    """
    unit, name = next(((u, n) for u, n in TIMES if seconds >= u), TIMES[-1])
    return f"{_short(seconds / unit)} {name}"


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0") if number < 10 else f"{number:.0f}"


def describe(found: Estimate, name: str, folder: Path) -> str:
    """Return an estimate in words.

    Args:
        found: The estimate.
        name: Name of the denoiser.
        folder: Where the result and the state will be.
    """
    lines = [f"{name}: {sum(group.layers for group in found.groups)} layers are quantized", ""]
    lines.append(f"{'layers':>6}  {'bits':6}{'weights':>9}  formats that are tried")
    for group in found.groups:
        head = f"{group.layers:6}  {group.bits:6}{group.weights / 1e6:7.2f} M  "
        formats = ["weights", *group.weight_formats]
        lines += textwrap.wrap(head + " ".join(formats), WIDTH, subsequent_indent=" " * len(head))
        if group.input_formats:
            inputs = " ".join(["inputs", *group.input_formats])
            indent = " " * len(head)
            lines += textwrap.wrap(inputs, WIDTH, initial_indent=indent, subsequent_indent=indent)
    rest = found.full_precision / 1e6
    lines += ["", f"{rest:.2f} M parameters stay in full precision."]
    lines += [f"Size: {size(found.after)} in place of {size(found.before)}.", ""]
    lines.append(f"{'stage':12}{'time':>10}{'peak memory':>14}")
    for stage in found.stages:
        memory = "" if stage.memory is None else size(stage.memory)
        lines.append(f"{stage.name:12}{duration(stage.seconds):>10}{memory:>14}")
    memory = "" if found.memory is None else size(found.memory)
    lines += [f"{'in all':12}{duration(found.seconds):>10}{memory:>14}", ""]
    return "\n".join(lines + _room(found, folder)) + "\n"


def _room(found: Estimate, folder: Path) -> list[str]:
    """Return what is needed of memory and disk, and whether there is as much."""
    disk, memory = free_disk(folder), available_bytes()
    lines = [f"Disk: {size(found.disk)} while it runs; {size(disk)} are free."]
    if found.disk > disk:
        lines.append("This is too little: give an --output on a larger disk.")
    if memory is not None and found.memory is not None and found.memory > memory:
        lines.append(
            f"Memory: {size(memory)} are free, which is too little: give --offload, fewer or "
            "smaller calls (--count, --batch), or a smaller --refine-samples."
        )
    return [line for each in lines for line in textwrap.wrap(each, WIDTH)]
