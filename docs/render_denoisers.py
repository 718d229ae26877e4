"""Quantize a small denoiser of every class that diffusers exports, and write the table of them.

PYTHONPATH=tests/helpers python docs/render_denoisers.py
"""

import copy
import logging
import math
import sys
import warnings
from pathlib import Path

import diffusers
from denoisers import CASES, Case  # type: ignore[import-not-found]

import msfp
from msfp.pipelines.trajectories import WholeForwards, as_vector

PAGE = Path(__file__).parent / "denoisers.md"
TITLE = f"""# Every denoiser of diffusers

Small models with random weights, of every class that diffusers {diffusers.__version__} exports:
denoisers, control networks and adapters. Each was quantized by the default recipe, refined on one
call, packed, saved and loaded. `tests/msfp/test_every_denoiser.py` repeats this;
`docs/render_denoisers.py` writes this page.

- **steps**: whether the class was quantized, refined, packed, saved, loaded and fine-tuned.
- **rows**: "joined" if samples of several calls are put into one batch, "whole" if each recorded
  forward is run by itself, which is slower.
- **4 bits**: share of parameters, and of multiply-adds, in layers with 4-bit weights. The layers
  that read the sample and write the prediction have 8 bits, and the products of attention are not
  quantized. Small models have more of both than large ones.
- **largest rest**: the largest module that stays in full precision, and its share of parameters. It
  is an embedding, or no linear layer or convolution, or the call does not run it.
- **SQNR**: signal-to-quantization-noise ratio of the output on that call, in dB. It says that the
  quantized model works. Random weights say nothing on quality.

| class | steps | rows | 4 bits, parameters | 4 bits, multiply-adds | largest rest | SQNR, dB |
|---|---|---|--:|--:|---|--:|
"""


def steps(case: Case) -> str:
    """Return which of the steps the class goes through."""
    left_out = [
        name for name, done in (("saving", case.saved), ("tuning", case.trained)) if not done
    ]
    return f"all but {' and '.join(left_out)}" if left_out else "all"


def row(name: str, case: Case) -> str:
    """Return the row of a class in the table."""
    if case.reason:
        return f"| {name} | {case.reason} | | | | | |\n"
    full = case.make(name)
    before = as_vector(case.call(full)).double()
    whole = isinstance(msfp.record_trajectories(full, calls=case.call), WholeForwards)
    denoiser = copy.deepcopy(full)
    msfp.quantize(denoiser, calibration=case.call)
    msfp.pack(denoiser)
    error = as_vector(case.call(denoiser)).double() - before
    coverage = msfp.inspect_coverage(denoiser)
    assert coverage is not None  # noqa: S101 - it has just been counted
    shares = coverage.shares()[4]
    sqnr = 10 * math.log10(before.square().sum() / error.square().sum())
    left = next(
        (
            f"{each.kind} {each.parameters / coverage.parameters:.0%}"
            for each in coverage.left().values()
        ),
        "",
    )
    cells = [name, steps(case), "whole" if whole else "joined", *(f"{x:.0%}" for x in shares)]
    return f"| {' | '.join(cells)} | {left} | {sqnr:.1f} |\n"


def main() -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for number, (name, case) in enumerate(sorted(CASES.items()), 1):
        print(f"{number} of {len(CASES)}: {name}", file=sys.stderr)
        rows.append(row(name, case))
    PAGE.write_text(TITLE + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
