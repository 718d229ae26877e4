"""Measure ideas that were not kept; records are in docs/results/ideas.

python docs/measure_ideas.py [digits-ddpm | digits-dit | colour-ddpm] [--matching SEEDS]
    [--embeddings SEEDS]

Scales of inputs that follow time: what the rounding error of the inputs would be if every sampler
step had the best scale and zero point of its own, against one best pair for all. No function of
time can do better.

Matching where the path leads (--matching, on the UNet of digits): the loss is the distance from the
full-precision path after several steps of the quantized one, through which gradients flow, at as
many evaluations of the denoiser as one step takes otherwise.

Embeddings in 8 bits (--embeddings): the default recipe, with 8 bits for all layers that the sample
does not reach (those of the time embedding and of the class), or for the first two of them.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpformats import quantize_scaled
from msfp.checkpoint.io import packed_size
from msfp.config import QuantizationConfig
from msfp.evaluation.prediction_errors import noise_errors
from msfp.evaluation.whole_sets import paired_psnr
from msfp.experiments.study.ablation import Row
from msfp.experiments.study.bench import Bench
from msfp.experiments.study.machine import machine
from msfp.experiments.study.store import Store
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.trainable import trainable_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories
from msfp.ptq.quantization import pack, quantize
from msfp.schedulers.denoising_factors import denoising_factors
from msfp.support.hooks import hooked
from msfp.training.config import FinetuneConfig
from msfp.training.objective import Objective, Predict
from msfp.training.parameters import add_hubs
from msfp.training.teacher import Teacher
from msfp.training.trainer import Trainer, TrainingInputs

SCALES = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5)
ZERO_POINTS = (0.5, 0.75, 1.0, 1.25, 1.5)
RECORDS = Store(Path(__file__).parent / "results" / "ideas")
BITS = 4
CONFIG = QuantizationConfig(weight_bits=BITS, activation_bits=BITS, refine=None)
ROWS = 32
NUMBERS = 20_000
"""Numbers of a layer's input at a step, at most, whose error is measured."""
AHEAD = 4
"""Sampler steps that the path is followed for."""


def inputs_by_step(denoiser: nn.Module, path: Trajectories) -> dict[str, list[torch.Tensor]]:
    """Return what each layer reads in full precision at each sampler step, a random part of it."""
    inputs: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, x: torch.Tensor) -> None:
        order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
        inputs.setdefault(name, []).append(x.flatten()[order[:NUMBERS]])

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        for name, layer in trainable_layers(denoiser).items()
    ]
    rows = torch.arange(ROWS)
    with hooked(hooks), Teacher(denoiser).active():
        for step in range(len(path.timesteps)):
            path.predict(denoiser, torch.full_like(rows, step), rows)
    return inputs


def errors(quantizer: Quantizer, x: torch.Tensor) -> list[float]:
    """Return the squared errors of an input by every scale and zero point that is tried."""
    scale, zero = quantizer.scale.detach(), quantizer.zero_point
    pairs = [
        (scale * a, None if zero is None else zero.detach() * b)
        for a in SCALES
        for b in (ZERO_POINTS if zero is not None else (1.0,))
    ]
    return [
        (quantize_scaled(x, quantizer.format, s, z) - x).square().mean().item() for s, z in pairs
    ]


def record(row: Row, idea: str, found: dict[str, float]) -> None:
    """Print what was found, and keep it."""
    name = f"{row.model}/{idea}/{row.seed}"
    RECORDS.append({"name": name, "versions": machine()} | found)
    print(name, found)


def time_dependent_scales(row: Row, bench: Bench) -> None:
    """Measure the errors of inputs with the best scales of each step, relative to one for all."""
    pipe = bench.open()
    quantize(pipe, CONFIG, calibration=bench.calibration)
    denoiser = denoiser_of(pipe)
    inputs, by_step, by_quarter, weights = inputs_by_step(denoiser, bench.held_out), [], [], []
    for name, layer in trainable_layers(denoiser).items():
        quantizer = layer.input_quantizer
        if quantizer is None or quantizer.format.bits > BITS:
            continue
        if quantizer.scale.dim():
            continue  # has a scale for each channel
        found = torch.tensor([errors(quantizer, x) for x in inputs[name]])
        one = found.mean(0).min()
        by_step.append((found.min(1).values.mean() / one).item())
        quarters = [part.mean(0).min().item() for part in found.chunk(4)]
        by_quarter.append(statistics.mean(quarters) / one.item())
        power = statistics.mean(x.square().mean().item() for x in inputs[name])
        weights.append(one.item() / power)
    ratios = {"by_quarter": by_quarter, "by_step": by_step}
    means = {name: statistics.fmean(each, weights) for name, each in ratios.items()}
    record(row, "time-dependent-scales", means)


class PathObjective(Objective):
    """The squared distance from the full-precision path some DDIM steps on."""

    def __init__(self, steps: int, scheduler: Any) -> None:
        super().__init__(torch.ones(steps))
        factors = denoising_factors(scheduler, steps)
        self.slopes = torch.tensor([factors[t.item()] for t in scheduler.timesteps])
        alphas = scheduler.alphas_cumprod[scheduler.timesteps].sqrt()
        after = torch.cat([alphas[1:], scheduler.final_alpha_cumprod.sqrt()[None]])
        self.keeps: torch.Tensor = after / alphas

    def moved(self, step: torch.Tensor, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the sampler's next samples."""
        shape = (-1, *(1,) * (x.dim() - 1))
        return self.keeps[step].view(shape) * x + self.slopes[step].view(shape) * noise

    def errors(
        self,
        denoiser: nn.Module,
        path: Trajectories,
        targets: Predict,
        step: torch.Tensor,
        sample: torch.Tensor,
    ) -> torch.Tensor:
        """Return the distance of each sample, in units of what one step's error makes of it."""
        step = step.clamp(max=len(path.timesteps) - AHEAD)
        x = path.samples[step, sample]
        for ahead in range(AHEAD):
            now = step + ahead
            noise = denoiser(x, path.timesteps[now]).sample
            x = self.moved(now, x, noise)
        last = step + AHEAD - 1
        wanted = self.moved(last, path.samples[last, sample], targets(last, sample))
        scale = sum(self.slopes[step + ahead].square() for ahead in range(AHEAD))
        return (x - wanted).square().flatten(1).mean(dim=1) / scale


def path_matching(row: Row, bench: Bench) -> None:
    """Measure what training by the path gives."""
    pipe = bench.open()
    quantize(pipe, CONFIG, calibration=bench.calibration)
    denoiser, path = denoiser_of(pipe), bench.training
    config = FinetuneConfig(steps=160, batch=32 // AHEAD, seed=row.seed)
    pipe.scheduler.set_timesteps(row.steps)
    objective = PathObjective(row.steps, pipe.scheduler)
    inputs = TrainingInputs(path, objective, Teacher(denoiser))
    add_hubs(denoiser, config, path.timesteps)
    Trainer(denoiser, inputs, config).run()
    pack(denoiser)
    error = statistics.mean(noise_errors(denoiser, trajectories=bench.held_out))
    psnr = paired_psnr(bench.images(pipe), bench.reference)
    record(row, f"path-of-{AHEAD}-steps", {"noise_error": error, "psnr": psnr})


def embedding_bits(row: Row, bench: Bench) -> None:
    """Measure the default recipe with more bits for layers that the sample does not reach."""
    reached = set(bench.calibration.sample_path)
    beside = [name for name in bench.calibration.ran if name not in reached]
    wide = {"weight_bits": 8, "activation_bits": 8}
    for name, layers in (("none", []), ("first two", beside[:2]), ("all", beside)):
        pipe = bench.open()
        config = QuantizationConfig(overrides=dict.fromkeys(layers, wide))
        quantize(pipe, config, calibration=bench.calibration, trajectories=bench.training)
        pack(pipe)
        error = statistics.mean(noise_errors(pipe, trajectories=bench.held_out))
        found = {"noise_error": error, "bytes": packed_size(denoiser_of(pipe))}
        record(row, f"embeddings-in-8-bits-{name.replace(' ', '-')}", found)


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="digits-ddpm")
    parser.add_argument("--matching", type=int, default=0, help="how often to train, for minutes")
    parser.add_argument("--embeddings", type=int, default=0, help="how many seeds")
    arguments = parser.parse_args()
    for seed in range(arguments.embeddings):
        row = Row(arguments.model, 0, "ddim", 20, seed, "W4A4", "mixup")
        embedding_bits(row, Bench(row, None))
    if arguments.embeddings:
        return
    row = Row(arguments.model, 0, "ddim", 20, 0, "W4A4", "mixup")
    time_dependent_scales(row, Bench(row, None))
    for seed in range(arguments.matching):
        row = Row("digits-ddpm", 0, "ddim", 20, seed, "W4A4", "mixup")
        path_matching(row, Bench(row, None))


if __name__ == "__main__":
    main()
