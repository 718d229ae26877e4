"""The rows of the study: recipes, bit widths, and which of them are run on what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from msfp.config import FinetuneConfig, QuantizationConfig

SEEDS = range(5)
"""Replicates of rows that carry a claim: of calibration, trajectories, fine-tuning and noise."""
TRAININGS = range(3)
"""Independently trained full-precision models; 0 is the one that ships."""
SETTING = ("W4A4", "ddim", 20)
"""Bits, sampler and steps of the ladder itself."""


@dataclass(frozen=True)
class Recipe:
    """One way to quantize.

    Attributes:
        name: Short, without spaces.
        label: What tables call it.
        quantization: Fields of `QuantizationConfig` but for bits; None leaves full precision.
        finetune: Fields of `FinetuneConfig` but for its seed; None for no fine-tuning.
        against: The recipe that it adds something to, which it is tested against.
    """

    name: str
    label: str
    quantization: Mapping[str, Any] | None = field(default_factory=dict)
    finetune: Mapping[str, Any] | None = None
    against: str | None = None


TUNING = {"steps": 160}
FULL_PRECISION = "full-precision"
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(FULL_PRECISION, "full precision", quantization=None),
        Recipe("int-minmax", "INT min-max", {"scheme": "int_minmax"}),
        Recipe("int-mse", "INT, searched clip", {"scheme": "int_mse"}, against="int-minmax"),
        Recipe(
            "int-zero-point",
            "INT, clip and zero point",
            {"scheme": "int_zero_point"},
            against="int-mse",
        ),
        Recipe("mx", "MX blocks", {"scheme": "mx"}, against="int-mse"),
        Recipe("nvfp4", "NVFP4 blocks", {"scheme": "nvfp4"}, against="mx"),
        Recipe("signed", "signed FP", {"scheme": "signed"}, against="int-mse"),
        Recipe("mixup", "mixup-sign FP", {"scheme": "mixup"}, against="signed"),
        Recipe("signed-lora", "signed FP + LoRA", {"scheme": "signed"}, TUNING, against="signed"),
        Recipe("lora", "mixup-sign FP + LoRA", {}, TUNING, against="signed-lora"),
        Recipe("talora-2", "+ TALoRA, h = 2", {}, TUNING | {"hub": 2}, against="lora"),
        Recipe("talora-4", "+ TALoRA, h = 4", {}, TUNING | {"hub": 4}, against="talora-2"),
        Recipe(
            "talora-2-dfa-1",
            "+ TALoRA, h = 2, DFA, power 1",
            {},
            TUNING | {"hub": 2, "denoising_power": 1.0},
            against="talora-2",
        ),
        Recipe(
            "talora-2-dfa-2",
            "+ TALoRA, h = 2, DFA, power 2",
            {},
            TUNING | {"hub": 2, "denoising_power": 2.0},
            against="talora-2-dfa-1",
        ),
    )
}
"""The ladder: every recipe by name, each step after those that it builds on."""

BITS: dict[str, dict[str, Any]] = {
    "W3A4": {"weights": 3, "activations": 4, "first_last": 8},
    "W4A4-all": {"weights": 4, "activations": 4, "first_last": 4},
    "W4A4": {"weights": 4, "activations": 4, "first_last": 8},
    "W4A6": {"weights": 4, "activations": 6, "first_last": 8},
    "W4A8": {"weights": 4, "activations": 8, "first_last": 8},
    "W6A6": {"weights": 6, "activations": 6, "first_last": 8},
}
"""Bit widths by name; "all" has the first and the last layer at 4 bits too."""

FOLLOWED = (FULL_PRECISION, "signed", "mixup", "lora")
"""Recipes that are followed to other bits, samplers and full-precision models."""
SAMPLERS = tuple((name, steps) for name in ("ddim", "plms", "dpm++") for steps in (10, 20, 50, 100))
MODELS = ("digits-ddpm", "digits-dit", "colour-ddpm")


@dataclass(frozen=True, order=True)
class Row:
    """One run of the study; its name is unique.

    Attributes:
        model: Name of the reference model.
        training: Which independently trained one.
        sampler: A name of `msfp.schedulers.SAMPLERS`.
        steps: Sampler steps.
        seed: Seed of calibration, trajectories, fine-tuning and noise alike.
        bits: A name of `BITS`.
        recipe: A name of `RECIPES`.
    """

    model: str
    training: int
    sampler: str
    steps: int
    seed: int
    bits: str
    recipe: str

    @property
    def name(self) -> str:
        """The row as a path, such as `digits-ddpm/0/lora/W4A4/ddim-20/3`.

        Example:
            >>> Row("digits-ddpm", 0, "ddim", 20, 3, "W4A4", "lora").name
            'digits-ddpm/0/lora/W4A4/ddim-20/3'
        """
        setting = f"{self.bits}/{self.sampler}-{self.steps}"
        return f"{self.model}/{self.training}/{self.recipe}/{setting}/{self.seed}"

    def quantization(self) -> QuantizationConfig | None:
        """Return the config of the quantization, None for full precision."""
        options = RECIPES[self.recipe].quantization
        return None if options is None else QuantizationConfig(**BITS[self.bits], **options)

    def finetune(self) -> FinetuneConfig | None:
        """Return the config of the fine-tuning, None for none."""
        options = RECIPES[self.recipe].finetune
        return None if options is None else FinetuneConfig(**options, seed=self.seed)


def ladder() -> list[Row]:
    """Return all rows, those first that share calibration and trajectories.

    Example:
        >>> rows = ladder()
        >>> len(rows) == len(set(rows))
        True
    """
    return sorted({row for model in MODELS for row in _rows(model) if _possible(row)})


def _rows(model: str) -> Iterator[Row]:
    bits, sampler, steps = SETTING
    for seed in SEEDS:
        for recipe in RECIPES:
            yield Row(model, 0, sampler, steps, seed, bits, recipe)
        for recipe in FOLLOWED:
            for training in TRAININGS:
                yield Row(model, training, sampler, steps, seed, bits, recipe)
            for width in BITS:
                yield Row(model, 0, sampler, steps, seed, width, recipe)
            for other, count in SAMPLERS:
                yield Row(model, 0, other, count, seed, bits, recipe)


def _possible(row: Row) -> bool:
    """Return whether a row says something: full precision has no bits but those of the ladder."""
    return row.recipe != FULL_PRECISION or row.bits == SETTING[0]
