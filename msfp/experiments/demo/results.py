"""The settings, methods and results of a demo, with its findings in words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMPipeline

from fpformats import Histogram
from msfp.config import QuantizationConfig, Scheme
from msfp.pipelines.sampler import Sampler
from msfp.search.summary import LayerSummary
from msfp.support.versions import versions


@dataclass(frozen=True)
class Settings:
    """Numbers of images, trajectories and steps of a run.

    Attributes:
        images: Images sampled for each method.
        calibration: Images sampled to collect layer inputs.
        trajectories: Recorded trajectories to train on.
        held_out: Recorded trajectories to measure the noise-prediction error on.
        finetune: Steps of each fine-tuning.
        sampler: Step count and batch of the DDIM sampler.
    """

    images: int
    calibration: int
    trajectories: int
    held_out: int
    finetune: int
    sampler: Sampler

    @property
    def label(self) -> str:
        """The key of these settings in the quality file of the reference model."""
        return f"{self.sampler.steps} steps, {self.images} images"


FULL = Settings(
    images=512, calibration=64, trajectories=256, held_out=64, finetune=160, sampler=Sampler(20)
)
QUICK = Settings(
    images=96, calibration=32, trajectories=64, held_out=32, finetune=20, sampler=Sampler(10, 32)
)


@dataclass(frozen=True)
class Method:
    """A row of the table: a scheme, with or without fine-tuning.

    Attributes:
        name: Name of the row.
        scheme: Scheme of the search.
        refined: Whether weights are corrected after the search, as msfp does by default.
        hub: LoRAs per layer, 0 for no fine-tuning.
        dfa_power: Power of the denoising factor in the loss.
    """

    name: str
    scheme: Scheme
    refined: bool = False
    hub: int = 0
    dfa_power: float = 0.0


METHODS = (
    Method("INT min-max", "int_minmax"),
    Method("INT MSE clip", "int_mse"),
    Method("INT zero point", "int_zero_point"),
    Method("signed FP", "signed"),
    Method("mixup-sign FP", "mixup"),
    Method("mixup-sign FP, refined", "mixup", refined=True),
    Method("signed FP + LoRA", "signed", hub=1),
    Method("mixup-sign FP + LoRA", "mixup", hub=1),
    Method("mixup-sign FP + TALoRA", "mixup", hub=2),
    Method("mixup-sign FP + TALoRA + DFA", "mixup", hub=2, dfa_power=1.0),
)
FULL_PRECISION = "full precision"


@dataclass
class Row:
    """The measurements of one method.

    Attributes:
        method: Name of the method.
        noise_error: Mean squared error of the noise prediction on held-out full-precision
            trajectories, mean over timesteps.
        psnr: Paired PSNR in dB against full-precision images from equal noise; None for full
            precision.
        frechet: Frechet distance from the real digits.
        unsigned_layers: Layers whose inputs are unsigned.
        bytes: Size of the denoiser's tensors.
        seconds: Time to quantize and fine-tune on one thread.
        errors: Noise-prediction error at each timestep.
    """

    method: str
    noise_error: float
    psnr: float | None
    frechet: float
    unsigned_layers: int
    bytes: int
    seconds: float
    errors: list[float]


@dataclass
class Results:
    """The results of a run; `to_dict` returns the contents of the JSON file.

    Attributes:
        config: Bit widths of every method.
        settings: Numbers of images, trajectories and steps of the run.
        seed: Seed of the run.
        timesteps: The sampler's timesteps.
        rows: Full precision first, then the methods in order.
        layers: Result of the mixup-sign search for each layer.
        routing: The LoRA that the last method selects for each layer (rows) at each timestep
            (columns).
        seed_noise: Frechet distances of the full-precision model, one for each seed, at the same
            number of images.
        spread: Relative standard deviation, over seeds, of the noise-prediction error of the single
            LoRA at the default bit widths; None at other bit widths.
        images: Some images of each method, from equal noise.
        inputs: Histograms of the calibration inputs, by layer.
        pipe: The last method's pipeline, packed.
    """

    config: QuantizationConfig
    settings: Settings
    seed: int
    timesteps: list[int]
    seed_noise: list[float]
    spread: float | None
    rows: list[Row]
    layers: list[LayerSummary]
    routing: list[list[int]]
    images: dict[str, torch.Tensor]
    inputs: dict[str, Histogram]
    pipe: DDIMPipeline

    def to_dict(self) -> dict[str, Any]:
        """Return everything but tensors as plain JSON types."""
        return {
            "config": self.config.to_dict(),
            "settings": asdict(self.settings),
            "seed": self.seed,
            "versions": versions(),
            "timesteps": self.timesteps,
            "full_precision_seed_noise": self.seed_noise,
            "finetune_seed_spread": self.spread,
            "rows": [asdict(row) for row in self.rows],
            "findings": findings(self),
            "layers": [layer.to_dict() for layer in self.layers],
            "routing": self.routing,
        }


def tied(first: Row, second: Row, spread: float) -> bool:
    """Return whether two errors differ by less than two standard errors of their difference."""
    return abs(math.log(first.noise_error / second.noise_error)) < 2 * math.sqrt(2) * spread


def findings(results: Results) -> list[str]:
    """Return the main results of the table as sentences; differences within seed noise are ties."""
    rows = {row.method: row for row in results.rows}
    limit = max(results.seed_noise)
    sentences = []
    searched = [rows[method.name] for method in METHODS if method.hub == 0]
    for worse, better in pairwise(searched):
        verb = "lowers" if better.noise_error < worse.noise_error else "does not lower"
        sentences.append(
            f"{better.method} {verb} the noise-prediction error of {worse.method} "
            f"({worse.noise_error:.4f} to {better.noise_error:.4f})."
        )
    tuned = [rows[method.name] for method in METHODS if method.hub > 0]
    for before, after in pairwise(tuned):
        if results.spread is None:
            sentences.append(
                f"{after.method} has an error of {after.noise_error:.4f}, {before.method} of "
                f"{before.noise_error:.4f}; seed noise was not measured at these bit widths."
            )
        elif tied(before, after, results.spread):
            sentences.append(
                f"{after.method} and {before.method} tie: their errors differ by less than those "
                "of two seeds of one LoRA can."
            )
        else:
            word = "lower" if after.noise_error < before.noise_error else "higher"
            sentences.append(
                f"{after.method} has a {word} error than {before.method} "
                f"({after.noise_error:.4f} against {before.noise_error:.4f}), beyond the seed "
                "noise of one LoRA."
            )
    within = [row.method for row in results.rows[1:] if row.frechet <= limit]
    sentences.append(
        f"Frechet distances up to {limit:.2f} are full-precision seed noise; within it: "
        f"{', '.join(within) or 'none'}."
    )
    return sentences
