"""How a quantized denoiser is brought back, as frozen, JSON-able objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from msfp.config import (
    MAX_HUB,
    MAX_RANK,
    MAX_SEED,
    MIN_SEED,
    check_choice,
    check_number,
    check_truth,
    check_whole,
)
from msfp.errors import InputError
from msfp.layers.lora.routers import RouterKind

Place = Literal["inside", "beside"]
Initial = Literal["zero", "svd"]
Precision = Literal["no", "fp16", "bf16"]


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
    groups = [each.name for each in dataclasses.fields(LearningRates)]
    unknown = rates.keys() - set(groups)
    if unknown:
        raise InputError(f"rates has no group {min(unknown)!r}: it may have {', '.join(groups)}")
    return LearningRates(**rates)


@dataclass(frozen=True)
class FinetuneConfig:
    """How a quantized denoiser is brought back.

    Attributes:
        hub: LoRAs per layer; 1 is a single LoRA without a router, 2 or 4 is the paper's TALoRA.
        rank: Rank of each LoRA.
        steps: Optimizer steps.
        batch: Samples in a step, over all processes and accumulated parts.
        rates: Learning rates by group.
        denoising_power: The power of the denoising factor that the loss at a timestep is weighted
            by: 0 is no weighting, 1 the paper's DFA, 2 exact for squared errors of the next sample.
        seed: Seed of initialisation and batches.
        routing: "learned" by a router with an embedding of the timestep of its own, by one that
            reads the "denoiser"'s, or "segments" with equally many of the sampler's steps.
        place: LoRAs "inside" the quantizer, Q(W + BA), or "beside" the quantized weight, Q(W) x +
            B A x, as branches of the layer.
        initial: LoRAs begin at "zero", or as the "svd" of the rounding error of the weight.
        temperature: Of the router's softmax, at the first step and at the last; geometric between.
        branches: Coefficients with which the sampler adds up the rows of the trajectories that are
            branches of one sample: (1 - g, g) for guidance of scale g with the unconditional
            branch first. The loss is that of the sum, and a share of that of each branch.
        branch_rows: Samples of a call of the pipeline: as many rows of one branch are followed by
            those of the next.
        accumulation: Parts that a process takes its batch in.
        clip: Largest norm of the gradient, or None.
        ema: Decay of the moving average of what is trained, which then is the result; 0 for none.
        precision: Mixed precision of forwards: "no", "fp16" or "bf16".
        checkpointing: Compute activations again in the backward pass, to save memory.
        shard: Leave each of several processes its part of the full-precision weights; a layer's is
            gathered while it computes.
        cache_teacher: Train towards the recorded predictions; False asks the full-precision
            denoiser again at each step.
        student_every: Steps after which the student's own path is recorded anew; every other step
            then trains on it. 0 for never.
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
    denoising_power: float = 0.0
    seed: int = 0
    routing: RouterKind = "learned"
    place: Place = "inside"
    initial: Initial = "zero"
    temperature: tuple[float, float] = (1.0, 1.0)
    branches: tuple[float, ...] = (1.0,)
    branch_rows: int = 1
    accumulation: int = 1
    clip: float | None = None
    ema: float = 0.0
    precision: Precision = "no"
    checkpointing: bool = False
    shard: bool = False
    cache_teacher: bool = True
    student_every: int = 0
    evaluate_every: int = 0
    patience: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", _learning_rates(self.rates))
        for name in ("temperature", "branches"):
            value = getattr(self, name)
            if not isinstance(value, Iterable) or isinstance(value, str):
                raise InputError(f"{name} must be a list of numbers, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        check_whole("hub", self.hub, 1, MAX_HUB)
        check_whole("rank", self.rank, 1, MAX_RANK)
        check_whole("seed", self.seed, MIN_SEED, MAX_SEED)
        for name in ("steps", "save_every"):
            check_whole(name, getattr(self, name), 1, 10**9)
        for name in ("batch", "branch_rows", "accumulation"):
            check_whole(name, getattr(self, name), 1, 10**6)
        for name in ("student_every", "evaluate_every", "patience"):
            check_whole(name, getattr(self, name), 0, 10**9)
        for name in ("checkpointing", "shard", "cache_teacher"):
            check_truth(name, getattr(self, name))
        check_number("denoising_power", self.denoising_power, 0, 4)
        check_number("ema", self.ema, 0, 0.999999)
        if self.clip is not None:
            check_number("clip", self.clip, 1e-12, 1e12)
        for temperature in self.temperature:
            check_number("temperature", temperature, 1e-3, 1e3)
        for coefficient in self.branches:
            check_number("branches", coefficient, -1e6, 1e6)
        check_choice("routing", self.routing, get_args(RouterKind))
        check_choice("place", self.place, get_args(Place))
        check_choice("initial", self.initial, get_args(Initial))
        check_choice("precision", self.precision, get_args(Precision))
        self._check_together()

    def _check_together(self) -> None:
        """Raise InputError where one value does not allow another."""
        if len(self.temperature) != 2:
            raise InputError(f"temperature must be the first and the last, not {self.temperature}")
        if not self.branches or not any(self.branches):
            raise InputError(f"branches must be coefficients, not all 0, not {self.branches}")
        if self.patience and not self.evaluate_every:
            raise InputError("patience needs evaluate_every to be above 0")
        if self.batch < self.accumulation:
            raise InputError(
                f"batch must be at least accumulation, {self.accumulation}, not {self.batch}"
            )

    @property
    def is_routed(self) -> bool:
        """Whether a router that is trained chooses among several LoRAs."""
        return self.hub > 1 and self.routing != "segments"

    @property
    def reads_denoiser(self) -> bool:
        """Whether that router reads the denoiser's embedding of the timestep."""
        return self.is_routed and self.routing == "denoiser"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)
