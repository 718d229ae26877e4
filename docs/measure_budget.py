"""Compare a budget with the same choice for every layer, at equal size.

Records are in docs/results/budget.

python docs/measure_budget.py MODEL [--seeds N] [--table]

Each uniform choice is quantized, and its size is given as the budget of a second quantization.
--table prints the table of docs/methods.md from the records.
"""

import argparse
import statistics
from pathlib import Path

from msfp.checkpoint.io import packed_size
from msfp.config import QuantizationConfig, RefinementConfig
from msfp.evaluation.prediction_errors import noise_errors
from msfp.evaluation.whole_sets import paired_psnr
from msfp.experiments.study.ablation import MODELS, Row
from msfp.experiments.study.bench import Bench
from msfp.experiments.study.machine import machine
from msfp.experiments.study.statistics import geometric_mean, mean
from msfp.experiments.study.store import VERSION, Store
from msfp.pipelines.denoiser import denoiser_of
from msfp.ptq.quantization import pack, quantize

RECORDS = Store(Path(__file__).parent / "results" / "budget")
UNIFORM = {"no branch": 0, "rank 4": 4, "rank 16": 16}
"""Ranks of the branches beside all layers of 4 bits."""


def measured(bench: Bench, config: QuantizationConfig) -> dict[str, float]:
    """Return the size, the error of predictions and the PSNR of images."""
    pipe = bench.open()
    quantize(pipe, config, calibration=bench.calibration, trajectories=bench.training)
    pack(pipe)
    return {
        "bytes": packed_size(denoiser_of(pipe)),
        "noise_error": statistics.mean(noise_errors(pipe, trajectories=bench.held_out)),
        "psnr": paired_psnr(bench.images(pipe), bench.reference),
    }


def compare(model: str, seed: int) -> None:
    """Measure each uniform choice, and the budget of its size."""
    bench = Bench(Row(model, 0, "ddim", 20, seed, "W4A4", "mixup"), None)
    for name, rank in UNIFORM.items():
        refine = RefinementConfig(seed=seed, branch_rank=rank)
        uniform = measured(bench, QuantizationConfig(refine=refine))
        budget = QuantizationConfig(
            refine=RefinementConfig(seed=seed), budget=f"{uniform['bytes'] / 1e6} MB"
        )
        record = {"name": f"{model}/{name}/{seed}", "version": VERSION, "versions": machine()}
        RECORDS.append(record | {"uniform": uniform, "budget": measured(bench, budget)})
        print(record["name"])


def table() -> None:
    """Print what the budget gives, by model and uniform choice."""
    print("| model | beside 4 bits | KB | error | with a budget | ratio | PSNR, dB |")
    print("|---|---|--:|--:|--:|--:|--:|")
    records = RECORDS.records()
    for model in MODELS:
        for name in UNIFORM:
            own = [each for key, each in records.items() if key.startswith(f"{model}/{name}/")]
            if not own:
                continue
            pairs = [(each["uniform"], each["budget"]) for each in own]
            errors = [statistics.mean(pair[i]["noise_error"] for pair in pairs) for i in (0, 1)]
            ratio = geometric_mean([b["noise_error"] / u["noise_error"] for u, b in pairs])
            gain = mean([b["psnr"] - u["psnr"] for u, b in pairs])
            size = statistics.mean(u["bytes"] for u, _ in pairs) / 1e3
            print(
                f"| {model} | {name} | {size:.0f} | {errors[0]:.5f} | {errors[1]:.5f} "
                f"| {ratio.text(2)} | {gain.text(1)} |"
            )


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=MODELS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    for seed in range(arguments.first, arguments.seeds if arguments.model else 0):
        compare(arguments.model, seed)
    if arguments.table:
        table()


if __name__ == "__main__":
    main()
