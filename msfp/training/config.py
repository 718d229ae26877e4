"""The settings of fine-tuning, as frozen dataclasses that convert to JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from msfp.config import MAX_RANK
from msfp.errors import InputError
from msfp.support.checks import (
    MAX_SEED,
    MIN_SEED,
    check_choice,
    check_keys,
    check_number,
    check_truth,
    check_whole,
)

Routing = Literal["learned", "segments"]
"""The keys of `msfp.layers.lora.routers.ROUTERS` that fine-tuning can use."""
LoRAPosition = Literal["inside", "beside"]
Precision = Literal["no", "fp16", "bf16"]
MAX_HUB = 16


@dataclass(frozen=True)
class LearningRates:
    """Initial learning rates of parameter groups; all fall to zero linearly. 0 freezes a group.

    Attributes:
        adapters: Learning rate of the LoRAs, in units of each layer's mean weight scale.
        router: Learning rate of the learned router.
        weight_scales: Learning rate of the scales of weights, in units of each layer's mean weight
            scale.
        input_scales: Learning rate of the scales and zero points of inputs, in units of each
            layer's mean input scale.
        biases: Learning rate of the biases of all layers.
        norms: Learning rate of the weights and biases of normalisation layers.

    Raises:
        InputError: If a rate is not between 0 and 1.
    """

    adapters: float = 0.01
    router: float = 1e-3
    weight_scales: float = 2e-3
    input_scales: float = 2e-3
    biases: float = 2e-4
    norms: float = 2e-4

    def __post_init__(self) -> None:
        for name, rate in dataclasses.asdict(self).items():
            check_number(f"rate of {name}", rate, 0, 1)


def _learning_rates(rates: Any) -> LearningRates:
    """Return learning rates, given as such or as a table."""
    if isinstance(rates, LearningRates):
        return rates
    if not isinstance(rates, Mapping):
        raise InputError(f"rates must be LearningRates or a table of them, not {rates!r}")
    check_keys("rates", rates, [each.name for each in dataclasses.fields(LearningRates)])
    return LearningRates(**rates)


@dataclass(frozen=True)
class FinetuneConfig:
    """How a quantized denoiser is fine-tuned.

    Attributes:
        hub: Number of LoRAs of each layer. 1 is a single LoRA without a router, 2 or 4 is the
            paper's TALoRA.
        rank: Rank of each LoRA.
        steps: Number of optimizer steps.
        batch: Samples in an optimizer step, over all processes and accumulated parts.
        rates: Learning rates of the parameter groups.
        dfa_power: Power of the denoising factor in the loss weight of a timestep: 0 is no
            weighting, 1 is the paper's DFA, 2 is exact for squared errors of the next sample.
        seed: Seed of the initialisation and the batches.
        routing: How one of a hub's LoRAs is chosen at a timestep: by a "learned" router, or by
            "segments", which divide the sampler's steps into equal parts.
        lora_position: Position of the LoRAs: "inside" the quantizer, Q(W + BA), or "beside" the
            quantized weight, Q(W) x + B A x, as low-rank branches of the layer.
        guidance_branches: Coefficients of the guidance branches in the guided prediction: (1 - g,
            g) for guidance scale g with the unconditional branch first. The loss is that of the
            guided prediction, plus a share of the loss of each guidance branch.
        guidance_rows: Samples in a call of the pipeline. The trajectories hold this number of rows
            of one guidance branch, then those of the next.
        accumulation: Parts into which each process splits its batch (gradient accumulation).
        clip: Largest norm of the gradient, or None for no clipping.
        ema: Decay of the moving average of the trained parameters, which becomes the result. 0 for
            no average.
        precision: Mixed precision of forward passes: "no", "fp16" or "bf16".
        checkpointing: Recompute activations in the backward pass, to save memory.
        shard: Divide the full-precision weights among the processes. The weight of a layer is
            gathered while the layer computes.
        cache_teacher: Train towards the recorded predictions. False recomputes the predictions of
            the full-precision denoiser at each step.
        evaluate_every: Steps between measurements of the error on held-out trajectories. The
            parameters with the lowest error are the result. 0 for no measurements.
        patience: Number of evaluations without a new lowest error after which training stops. 0
            never stops early.
        save_every: Steps between saved states.

    Raises:
        InputError: If a value is out of range.

    Example:
        >>> FinetuneConfig(hub=2, rates={"router": 2e-3}).rates.router
        0.002
    """

    hub: int = 1
    rank: int = 16
    steps: int = 160
    batch: int = 32
    rates: LearningRates = field(default_factory=LearningRates)
    dfa_power: float = 0.0
    seed: int = 0
    routing: Routing = "learned"
    lora_position: LoRAPosition = "inside"
    guidance_branches: tuple[float, ...] = (1.0,)
    guidance_rows: int = 1
    accumulation: int = 1
    clip: float | None = None
    ema: float = 0.0
    precision: Precision = "no"
    checkpointing: bool = False
    shard: bool = False
    cache_teacher: bool = True
    evaluate_every: int = 0
    patience: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", _learning_rates(self.rates))
        branches: Any = self.guidance_branches
        if not isinstance(branches, Iterable) or isinstance(branches, str):
            raise InputError(f"guidance_branches must be a list of numbers, not {branches!r}")
        object.__setattr__(self, "guidance_branches", tuple(branches))
        check_whole("hub", self.hub, 1, MAX_HUB)
        check_whole("rank", self.rank, 1, MAX_RANK)
        check_whole("seed", self.seed, MIN_SEED, MAX_SEED)
        for name in ("steps", "save_every"):
            check_whole(name, getattr(self, name), 1, 10**9)
        for name in ("batch", "guidance_rows", "accumulation"):
            check_whole(name, getattr(self, name), 1, 10**6)
        for name in ("evaluate_every", "patience"):
            check_whole(name, getattr(self, name), 0, 10**9)
        for name in ("checkpointing", "shard", "cache_teacher"):
            check_truth(name, getattr(self, name))
        check_number("dfa_power", self.dfa_power, 0, 4)
        check_number("ema", self.ema, 0, 0.999999)
        if self.clip is not None:
            check_number("clip", self.clip, 1e-12, 1e12)
        for coefficient in self.guidance_branches:
            check_number("guidance_branches", coefficient, -1e6, 1e6)
        check_choice("routing", self.routing, get_args(Routing))
        check_choice("lora_position", self.lora_position, get_args(LoRAPosition))
        check_choice("precision", self.precision, get_args(Precision))
        self._check_together()

    def _check_together(self) -> None:
        """Raise InputError for values that do not fit together."""
        if not any(self.guidance_branches):
            raise InputError(
                f"guidance_branches must be coefficients, not all 0, not {self.guidance_branches}"
            )
        if self.patience and not self.evaluate_every:
            raise InputError("patience needs evaluate_every to be above 0")
        if self.batch < self.accumulation:
            raise InputError(
                f"batch must be at least accumulation, {self.accumulation}, not {self.batch}"
            )

    @property
    def is_routed(self) -> bool:
        """Whether a learned router chooses among several LoRAs."""
        return self.hub > 1 and self.routing == "learned"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)


OPTIONS_OF_1 = {
    "denoising_power": "dfa_power",
    "place": "lora_position",
    "branches": "guidance_branches",
    "branch_rows": "guidance_rows",
}
"""Names of options in msfp 0.2.0, and their current names."""
RETIRED_OF_1: dict[str, Any] = {"initial": "zero", "temperature": [1.0, 1.0], "student_every": 0}
"""Options that only msfp 0.2.0 had, with the values that have no effect."""


def options_of_version_1(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that msfp 0.2.0 wrote, under their current names.

    Options that no longer exist are removed if their value has no effect, and kept otherwise.

    Example:
        >>> options_of_version_1({"place": "inside", "initial": "zero", "student_every": 40})
        {'lora_position': 'inside', 'student_every': 40}
    """
    return {
        OPTIONS_OF_1.get(name, name): value
        for name, value in options.items()
        if name not in RETIRED_OF_1 or value != RETIRED_OF_1[name]
    }
