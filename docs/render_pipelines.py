"""Quantize a small pipeline of every kind, and write the table of them.

PYTHONPATH=tests/helpers python docs/render_pipelines.py
"""

import logging
import sys
import warnings
from pathlib import Path

import diffusers
from pipelines import CASES, PipelineCase  # type: ignore[import-not-found]

import msfp
from msfp.support.decibels import sqnr

PAGE = Path(__file__).parent / "pipelines.md"
TITLE = f"""# Every kind of pipeline

Small pipelines with random weights, of diffusers {diffusers.__version__}. Each was quantized by the
default recipe with calls of its own, packed, saved, loaded, evaluated and fine-tuned, in Python and
on the command line. `tests/msfp/test_every_pipeline.py` repeats this; `docs/render_pipelines.py`
writes this page.

- **denoisers**: the components that are quantized.
- **call**: the arguments of a call beside the prompt, the steps and the noise. On the command line
  they are given by `--call`.
- **4 bits**: share of the denoisers' multiply-adds in layers with 4-bit weights.
- **SQNR**: signal-to-quantization-noise ratio of the result from equal noise, in dB. It says that
  the quantized pipeline works. Random weights say nothing on quality.

Four pipelines cannot be loaded from a folder: diffusers {diffusers.__version__} does not find
classes of theirs that it saved (StableCascadeDecoder, StableCascadeCombined, WuerstchenCombined,
UnCLIP). The two priors return embeddings, which `msfp evaluate` does not compare. An IP-Adapter is
loaded after quantization. The pipeline with perturbed attention (PAG) sets other attention
processors during its calls, so its denoiser is not trained on recorded calls.

| pipeline | kind | denoisers | call | 4 bits | SQNR, dB |
|---|---|---|---|--:|--:|
"""
USUAL = {"prompt", "num_inference_steps", "class_labels", "output_type"}


def row(name: str, case: PipelineCase) -> str:
    """Return the row of a pipeline in the table."""
    cells = [name, case.kind, ", ".join(case.denoisers)]
    cells.append(", ".join(f"`{key}`" for key in case.arguments() if key not in USUAL))
    pipe = case.make()
    if "IP-Adapter" in name:
        return f"| {' | '.join(cells)} | | |\n"
    before = case.call(pipe).double()
    msfp.quantize(pipe, calibration=case.call)
    msfp.pack(pipe)
    error = case.call(pipe).double() - before
    coverage = msfp.inspect_coverage(pipe)
    assert coverage is not None  # noqa: S101 - it has just been counted
    ratio = sqnr(before.square().sum().item(), error.square().sum().item())
    cells += [f"{coverage.shares()[4][1]:.0%}", f"{ratio:.1f}"]
    return f"| {' | '.join(cells)} |\n"


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
