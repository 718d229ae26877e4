"""How a quantized denoiser is fine-tuned, as frozen objects that JSON can hold."""

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
"""Keys of `msfp.layers.lora.routers.ROUTERS`, those that are trained."""
LoRAPosition = Literal["inside", "beside"]
Precision = Literal["no", "fp16", "bf16"]
MAX_HUB = 16


@dataclass(frozen=True)
class LearningRates:
    """Initial rate of each group of parameters; all fall to zero linearly. 0 freezes a group.

    Attributes:
        adapters: LoRAs, in units of each layer's mean weight scale.
        router: The learned router.
        weight_scales: Scales of weights, each in units of its layer's own.
        input_scales: Scales and zero points of inputs, likewise.
        biases: Biases of all layers.
        norms: Weights and biases of normalisations.

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
    """Return learning rates, from those or from a table of them."""
    if isinstance(rates, LearningRates):
        return rates
    if not isinstance(rates, Mapping):
        raise InputError(f"rates must be LearningRates or a table of them, not {rates!r}")
    check_keys("rates", rates, [each.name for each in dataclasses.fields(LearningRates)])
    return LearningRates(**rates)


@dataclass(frozen=True)
class FinetuneConfig:
    """How a quantized denoiser is brought back by training.

    Attributes:
        hub: LoRAs of each layer; 1 is a single LoRA without a router, 2 or 4 is the paper's
            TALoRA.
        rank: Rank of each LoRA.
        steps: Optimizer steps.
        batch: Samples in a step, over all processes and accumulated parts.
        rates: Learning rates by group.
        dfa_power: Power of the denoising factor that the loss at a timestep is weighted by: 0 is
            no weighting, 1 the paper's DFA, 2 exact for squared errors of the next sample.
        seed: Seed of initialisation and batches.
        routing: What chooses among the LoRAs of a hub: a "learned" router, or "segments" with
            equally many of the sampler's steps.
        lora_position: LoRAs "inside" the quantizer, Q(W + BA), or "beside" the quantized weight,
            Q(W) x + B A x, as low-rank branches of the layer.
        guidance_branches: Coefficients with which the sampler adds up the rows of the trajectories
            that are guidance branches of one sample: (1 - g, g) for guidance of scale g with the
            unconditional branch first. The loss is that of the sum, and a share of that of each.
        guidance_rows: Samples of a call of the pipeline: as many rows of one guidance branch are
            followed by those of the next.
        accumulation: Parts that a process takes its batch in.
        clip: Largest norm of the gradient, or None.
        ema: Decay of the moving average of what is trained, which then is the result; 0 for none.
        precision: Mixed precision of forwards: "no", "fp16" or "bf16".
        checkpointing: Compute activations again in the backward pass, to save memory.
        shard: Leave each of several processes its part of the full-precision weights; a layer's is
            gathered while it computes.
        cache_teacher: Train towards the recorded predictions; False computes those of the
            full-precision denoiser again at each step.
        evaluate_every: Steps after which the error on held-out trajectories is measured; the
            parameters of the lowest are the result. 0 for never.
        patience: Evaluations without a new lowest error after which training stops; 0 for never.
        save_every: Steps after which the state is saved.

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
        """Raise InputError where one value does not allow another."""
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
        """Whether a router that is trained chooses among several LoRAs."""
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
"""Names that options had in msfp 0.2.0, and what they are now."""
RETIRED_OF_1: dict[str, Any] = {"initial": "zero", "temperature": [1.0, 1.0], "student_every": 0}
"""Options of msfp 0.2.0 that are gone, with the values that change nothing."""


def options_of_version_1(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as msfp 0.2.0 wrote them by the names that they have now.

    Those that are gone are left out where they change nothing, and kept where they do.

    Example:
        >>> options_of_version_1({"place": "inside", "initial": "zero", "student_every": 40})
        {'lora_position': 'inside', 'student_every': 40}
    """
    return {
        OPTIONS_OF_1.get(name, name): value
        for name, value in options.items()
        if name not in RETIRED_OF_1 or value != RETIRED_OF_1[name]
    }
