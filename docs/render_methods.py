"""Measure what each method does for the reference model, and put the table into its page.

python docs/render_methods.py [images] [seeds]

Calibration takes 64 images, refinement and fine-tuning 256 trajectories, the error of the
prediction 64 others; every method samples from the same noise. Takes some minutes for each seed.
"""

import copy
import re
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import msfp
from msfp.evaluate import FrechetDistance, noise_errors, paired_psnr
from msfp.reference import ddim_pipeline, digit_classifier
from msfp.reference.digits import digits

Refine = partial(msfp.RefinementConfig, samples=256, split_inputs=False, branch_rank=0)
PAGE = Path(__file__).parent / "methods.md"
HEADER = (
    "| method | noise-prediction error | paired PSNR, dB | Frechet distance | CPU seconds |\n"
    "|---|--:|--:|--:|--:|\n"
)
ROUNDING = {"match_inputs": False, "correct_bias": "none"}
"""Rounding alone."""
METHODS: dict[str, tuple[msfp.RefinementConfig | None, int]] = {
    "nearest, the paper's": (None, 0),
    "bias of the last layer": (Refine("nearest", match_inputs=False, correct_bias="last"), 0),
    "all biases": (Refine("nearest", match_inputs=False), 0),
    "GPTQ": (Refine("gptq", **ROUNDING), 0),
    "GPTQ, two sweeps": (Refine("gptq", sweeps=2, **ROUNDING), 0),
    "AdaRound": (Refine("adaround", **ROUNDING), 0),
    "matched weights, all biases": (Refine("nearest"), 0),
    "GPTQ, matched weights, all biases": (Refine(), 0),
    "the same, split inputs": (Refine(split_inputs=True), 0),
    "the same, split inputs, branch of rank 4": (Refine(split_inputs=True, branch_rank=4), 0),
    "**the same, split inputs, branch of rank 16: the default**": (
        Refine(split_inputs=True, branch_rank=16),
        0,
    ),
    "nearest, LoRA of 160 steps": (None, 160),
    "GPTQ, matched, split, LoRA of 160 steps": (Refine(split_inputs=True), 160),
}
"""How weights are refined, and steps of fine-tuning."""


def measure(images: int, seed: int) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield each method and what was measured of it."""
    pipe, sampler = ddim_pipeline(), msfp.Sampler(20)
    calibration = msfp.calibrate(pipe, sampler.calls(64, seed + 1))
    training = msfp.record_trajectories(pipe, sampler.calls(256, seed + 2))
    held_out = msfp.record_trajectories(pipe, sampler.calls(64, seed + 3))
    distance = FrechetDistance(digit_classifier(), (digits()[0] + 1) / 2)
    reference = sampler(pipe, images, seed + 4)
    for name, (refinement, steps) in METHODS.items():
        quantized, started = copy.deepcopy(pipe), time.process_time()
        config = msfp.QuantizationConfig(refine=refinement)
        msfp.quantize(quantized, config, calibration=calibration, trajectories=training)
        if steps:
            msfp.finetune(quantized.unet, training, msfp.FinetuneConfig(steps=steps, seed=seed))
        seconds = time.process_time() - started
        sampled = sampler(quantized, images, seed + 4)
        error = statistics.mean(noise_errors(quantized.unet, held_out))
        yield name, (error, paired_psnr(sampled, reference), distance(sampled), seconds)


def main() -> None:
    """Measure every method over seeds, and replace the table of the page."""
    images, seeds = (int(each) for each in (*sys.argv[1:], 512, 3)[:2])
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        for name, numbers in measure(images, 10 * seed):
            found[name].append(numbers)
            print(seed, name, *numbers, flush=True)
    lines = [HEADER]
    for name, runs in found.items():
        error, psnr, frechet, seconds = (statistics.mean(each) for each in zip(*runs, strict=True))
        lines.append(f"| {name} | {error:.5f} | {psnr:.1f} | {frechet:.2f} | {seconds:.0f} |\n")
    pattern = r"(<!-- table -->\n).*?(<!-- end -->)"
    table = "".join(lines)
    text = re.sub(pattern, lambda m: m[1] + table + m[2], PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
