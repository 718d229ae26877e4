"""The rows of the study: an ablation of recipes, bit widths, samplers and models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from msfp.config import QuantizationConfig, RefinementConfig
from msfp.training.config import FinetuneConfig

SEEDS = range(5)
"""Seeds of the replicates of a row: of its calibration, trajectories, fine-tuning and noise."""
TRAININGS = range(3)
"""Independently trained full-precision models; 0 is the one that ships."""
SETTING = ("W4A4", "ddim", 20)
"""Bits, sampler and steps at which all recipes are run."""
REVISION = 1
"""Raised when the code gives other numbers for equal settings; older records are then ignored."""


@dataclass(frozen=True)
class Recipe:
    """One way to quantize.

    Attributes:
        name: Short, without spaces.
        label: Name in tables.
        quantization: Fields of `QuantizationConfig` without bit widths; None for full precision.
        finetune: Fields of `FinetuneConfig` without the seed; None for no fine-tuning.
        against: The recipes that it is tested against. The first is the recipe that it extends.
        retired: The last version that can run it, empty if this version can. The records of a
            retired recipe show no improvement.
    """

    name: str
    label: str
    quantization: Mapping[str, Any] | None
    finetune: Mapping[str, Any] | None = None
    against: tuple[str, ...] = ()
    retired: str = ""

    @property
    def title(self) -> str:
        """The label; of a retired recipe, with the last version that can run it."""
        return f"{self.label} (until {self.retired})" if self.retired else self.label


PLAIN: dict[str, Any] = {"refine": None}
"""Weights rounded to the nearest value, as in the paper."""
TUNED: dict[str, Any] = {"steps": 160}
FIXED_SCALES = {"rates": {"weight_scales": 0.0, "input_scales": 0.0}}
TWO_HUBS = TUNED | {"hub": 2}
FULL_PRECISION = "full-precision"
DEFAULT = "default"
"""The recipe that `msfp quantize` uses by default."""


def _refined(**options: Any) -> dict[str, Any]:
    basic = {
        "split_inputs": False,
        "branch_rank": 0,
        "branch_bits": 16,
        "branch_metric": "weight",
        "rotate_inputs": False,
        "samples": 64,
    }
    return {"refine": basic | options}


def _retired(name: str, label: str, against: tuple[str, ...], *, tuned: bool = False) -> Recipe:
    """Return a recipe that msfp 0.2.0 was the last version to run."""
    quantization = PLAIN if tuned else _refined()
    return Recipe(name, label, quantization, TUNED if tuned else None, against, retired="0.2.0")


def _rounded(rounding: str, **options: Any) -> dict[str, Any]:
    """Return a refinement of the rounding alone, plus the given options."""
    alone = {"match_inputs": False, "correct_bias": "none"}
    return _refined(rounding=rounding, **(alone | options))


def _refined_blocks(scheme: str, label: str, beside: str = "") -> tuple[Recipe, ...]:
    """Return the recipes that refine a block scheme, against those of another scheme too."""
    others = [(f"{beside}-pure",), (f"{beside}-refined",)] if beside else [(), ()]
    pure = _refined(samples=None) | {"scheme": scheme}
    branched = _refined(branch_rank=16, samples=None) | {"scheme": scheme}
    name = f"{scheme}-pure"

    def more(recipe: dict[str, Any], **options: bool) -> dict[str, Any]:
        return {**recipe, "refine": recipe["refine"] | options}

    return (
        Recipe(
            name, f"{label} blocks, refined without branches", pure, against=(scheme, *others[0])
        ),
        Recipe(
            f"{scheme}-refined",
            f"{label} blocks, refined",
            branched,
            against=(name, scheme, *others[1]),
        ),
        Recipe(
            f"{name}-searched",
            f"{label} blocks, refined without branches, input scales searched",
            more(pure, search_input_scales=True),
            against=(name,),
        ),
        Recipe(
            f"{scheme}-searched",
            f"{label} blocks, refined, input scales searched",
            more(branched, search_input_scales=True),
            against=(f"{scheme}-refined", f"{name}-searched"),
        ),
        Recipe(
            f"{name}-rotated",
            f"{label} blocks, refined without branches, inputs rotated",
            more(pure, rotate_inputs=True),
            against=(name,),
        ),
        Recipe(
            f"{scheme}-rotated",
            f"{label} blocks, refined, inputs rotated",
            more(branched, rotate_inputs=True),
            against=(f"{scheme}-refined", f"{name}-rotated"),
        ),
    )


_ABLATION = (
    Recipe(FULL_PRECISION, "full precision", None),
    Recipe("int-minmax", "INT min-max", PLAIN | {"scheme": "int_minmax"}),
    Recipe("int-mse", "INT, clip", PLAIN | {"scheme": "int_mse"}, against=("int-minmax",)),
    Recipe(
        "int-zero-point",
        "INT, clip, zero point",
        PLAIN | {"scheme": "int_zero_point"},
        against=("int-mse",),
    ),
    Recipe("mx", "MX blocks", PLAIN | {"scheme": "mx"}, against=("int-mse",)),
    Recipe("nvfp4", "NVFP4 blocks", PLAIN | {"scheme": "nvfp4"}, against=("mx",)),
    Recipe(
        "nvfp4_int4",
        "NVFP4 or INT4 blocks",
        PLAIN | {"scheme": "nvfp4_int4"},
        against=("nvfp4",),
    ),
    *_refined_blocks("mx", "MX"),
    *_refined_blocks("nvfp4", "NVFP4"),
    *_refined_blocks("nvfp4_int4", "NVFP4 or INT4", beside="nvfp4"),
    Recipe("signed", "signed FP", PLAIN | {"scheme": "signed"}, against=("int-mse",)),
    Recipe("mixup", "mixup-sign FP", PLAIN, against=("signed", "nvfp4")),
    Recipe(
        "last-bias",
        "mixup, bias of the last layer",
        _rounded("nearest", correct_bias="last"),
        against=("mixup",),
    ),
    Recipe(
        "all-biases",
        "mixup, all biases",
        _rounded("nearest", correct_bias="all"),
        against=("mixup",),
    ),
    Recipe("gptq", "mixup + GPTQ", _rounded("gptq"), against=("mixup",)),
    _retired("gptq-sweeps", "mixup + GPTQ, two sweeps", ("gptq",)),
    _retired("adaround", "mixup + AdaRound", ("gptq",)),
    Recipe(
        "matched-nearest", "mixup, matched", _refined(rounding="nearest"), against=("all-biases",)
    ),
    Recipe("matched", "mixup + GPTQ, matched", _refined(), against=("gptq",)),
    _retired("matched-sweeps", "matched, two sweeps", ("matched",)),
    _retired("matched-adaround", "mixup + AdaRound, matched", ("matched",)),
    Recipe("split", "matched + split inputs", _refined(split_inputs=True), against=("matched",)),
    Recipe(
        "pure",
        "split, 256 samples",
        _refined(split_inputs=True, samples=None),
        against=("split",),
    ),
    Recipe(
        "pure-tokens",
        "split, 256 samples, token scales",
        _refined(split_inputs=True, samples=None, token_scales=True),
        against=("pure",),
    ),
    Recipe(
        "pure-rotated",
        "split, 256 samples, rotated inputs",
        _refined(split_inputs=True, samples=None, rotate_inputs=True),
        against=("pure",),
    ),
    Recipe(
        "pure-tokens-rotated",
        "split, 256 samples, token scales, rotated inputs",
        _refined(split_inputs=True, samples=None, token_scales=True, rotate_inputs=True),
        against=("pure-tokens", "pure-rotated"),
    ),
    Recipe(
        "branch-4",
        "split + low-rank branch of rank 4",
        _refined(split_inputs=True, branch_rank=4),
        against=("split",),
    ),
    Recipe(
        "branch-16",
        "split + low-rank branch of rank 16",
        _refined(split_inputs=True, branch_rank=16),
        against=("branch-4", "mixup"),
    ),
    Recipe(
        "samples-256",
        "split + low-rank branch of rank 16, 256 samples",
        _refined(split_inputs=True, branch_rank=16, samples=None),
        against=("branch-16", "mixup", "nvfp4"),
    ),
    Recipe(
        "branch-16-int8",
        "split + low-rank branch of rank 16 in 8 bits, 256 samples",
        _refined(split_inputs=True, branch_rank=16, branch_bits=8, samples=None),
        against=("samples-256", "mixup", "nvfp4"),
    ),
    Recipe(
        "tokens",
        "low-rank branch in 8 bits, 256 samples, token scales",
        _refined(split_inputs=True, branch_rank=16, branch_bits=8, samples=None, token_scales=True),
        against=("branch-16-int8", "pure-tokens"),
    ),
    Recipe(
        "rotated",
        "low-rank branch in 8 bits, 256 samples, rotated inputs",
        _refined(
            split_inputs=True, branch_rank=16, branch_bits=8, samples=None, rotate_inputs=True
        ),
        against=("branch-16-int8", "pure-rotated"),
    ),
    Recipe(
        "tokens-rotated",
        "low-rank branch in 8 bits, 256 samples, token scales, rotated inputs",
        _refined(
            split_inputs=True,
            branch_rank=16,
            branch_bits=8,
            samples=None,
            token_scales=True,
            rotate_inputs=True,
        ),
        against=("tokens", "rotated"),
    ),
    Recipe(DEFAULT, "default", {"refine": {}}, against=("branch-16-int8", "rotated", "mixup")),
    Recipe(
        "signed-lora", "signed + LoRA", PLAIN | {"scheme": "signed"}, TUNED, against=("signed",)
    ),
    Recipe(
        "fixed-lora", "mixup + LoRA, scales fixed", PLAIN, TUNED | FIXED_SCALES, against=("mixup",)
    ),
    Recipe("lora", "mixup + LoRA", PLAIN, TUNED, against=("fixed-lora", "mixup", DEFAULT)),
    Recipe(
        "segments-2",
        "mixup + LoRA by segment, h = 2",
        PLAIN,
        TWO_HUBS | {"routing": "segments"},
        against=("lora",),
    ),
    Recipe("talora-2", "mixup + TALoRA, h = 2", PLAIN, TWO_HUBS, against=("segments-2", "lora")),
    Recipe(
        "talora-4", "mixup + TALoRA, h = 4", PLAIN, TUNED | {"hub": 4}, against=("talora-2", "lora")
    ),
    Recipe(
        "dfa-1",
        "mixup + TALoRA, h = 2 + DFA, power 1",
        PLAIN,
        TWO_HUBS | {"dfa_power": 1.0},
        against=("talora-2", "lora"),
    ),
    Recipe(
        "dfa-2",
        "mixup + TALoRA, h = 2 + DFA, power 2",
        PLAIN,
        TWO_HUBS | {"dfa_power": 2.0},
        against=("dfa-1", "lora"),
    ),
    _retired("svd-lora", "mixup + LoRA, from the SVD", ("lora",), tuned=True),
    _retired("own-path-lora", "mixup + LoRA, own path", ("lora",), tuned=True),
    _retired("annealed-talora-2", "mixup + TALoRA, h = 2, annealed", ("talora-2",), tuned=True),
    _retired(
        "conditioned-talora-2",
        "mixup + TALoRA, h = 2, the denoiser's embedding",
        ("talora-2", "lora"),
        tuned=True,
    ),
    Recipe("narrow-lora", "mixup + LoRA of rank 2", PLAIN, TUNED | {"rank": 2}, against=("lora",)),
    Recipe(
        "narrow-talora-2",
        "mixup + TALoRA of rank 2, h = 2",
        PLAIN,
        TWO_HUBS | {"rank": 2},
        against=("narrow-lora",),
    ),
    Recipe("long-lora", "mixup + LoRA, 640 steps", PLAIN, {"steps": 640}, against=("lora",)),
    Recipe(
        "long-talora-2",
        "mixup + TALoRA, h = 2, 640 steps",
        PLAIN,
        {"steps": 640, "hub": 2},
        against=("long-lora",),
    ),
    Recipe("matched-lora", "matched + LoRA", _refined(), TUNED, against=("lora",)),
    Recipe(
        "split-lora", "split + LoRA", _refined(split_inputs=True), TUNED, against=("matched-lora",)
    ),
    Recipe(
        "branch-16-lora",
        "split + low-rank branch of rank 16 + LoRA",
        _refined(split_inputs=True, branch_rank=16),
        TUNED,
        against=("branch-16", "lora"),
    ),
    Recipe(
        "branch-16-talora-2",
        "split + low-rank branch of rank 16 + TALoRA, h = 2",
        _refined(split_inputs=True, branch_rank=16),
        TWO_HUBS,
        against=("branch-16-lora",),
    ),
    Recipe(
        "samples-256-lora",
        "split + low-rank branch of rank 16, 256 samples + LoRA",
        _refined(split_inputs=True, branch_rank=16, samples=None),
        TUNED,
        against=("samples-256", "branch-16-lora", "lora"),
    ),
    Recipe(
        "branch-16-int8-lora",
        "split + low-rank branch of rank 16 in 8 bits, 256 samples + LoRA",
        _refined(split_inputs=True, branch_rank=16, branch_bits=8, samples=None),
        TUNED,
        against=("branch-16-int8", "samples-256-lora", "lora"),
    ),
)
RECIPES = {recipe.name: recipe for recipe in _ABLATION}
"""All recipes by name; each recipe follows those that it extends."""

BITS: dict[str, dict[str, Any]] = {
    "W3A3": {"weight_bits": 3, "activation_bits": 3, "end_bits": 8},
    "W3A4": {"weight_bits": 3, "activation_bits": 4, "end_bits": 8},
    "W4A4-all": {"weight_bits": 4, "activation_bits": 4, "end_bits": 4},
    "W4A4-x8": {"weight_bits": 4, "activation_bits": 4, "end_bits": 4},
    "W4A4": {"weight_bits": 4, "activation_bits": 4, "end_bits": 8},
    "W4A6": {"weight_bits": 4, "activation_bits": 6, "end_bits": 8},
    "W4A8": {"weight_bits": 4, "activation_bits": 8, "end_bits": 8},
    "W6A6": {"weight_bits": 6, "activation_bits": 6, "end_bits": 8},
}
"""Bit widths by name. In "all", the first and the last layer have 4 bits too. In "x8", only their
weights have 4 bits."""
ENDS = {
    "digits-ddpm": ("conv_in", "conv_out"),
    "digits-dit": ("pos_embed.proj", "proj_out_2"),
    "colour-ddpm": ("conv_in", "conv_out"),
}
"""First and last layer of each model. In "x8", their inputs have 8 bits."""

FOLLOWED = (
    FULL_PRECISION, "signed", "mixup", "matched", "branch-16", "branch-16-lora",
    "samples-256", "samples-256-lora", "lora", "segments-2", "talora-2", "dfa-1",
)  # fmt: skip
"""Recipes that also run at other bit widths, samplers and full-precision models."""
SAMPLERS = tuple((name, steps) for name in ("ddim", "plms", "dpm++") for steps in (10, 20, 50, 100))
MODELS = ("digits-ddpm", "digits-dit", "colour-ddpm")


@dataclass(frozen=True, order=True)
class Row:
    """One run of the study; its name is unique.

    Attributes:
        model: Name of the reference model.
        training: Which independently trained model; one of `TRAININGS`.
        sampler: A name of `msfp.schedulers.samplers.SAMPLERS`.
        steps: Sampler steps.
        seed: Seed of calibration, trajectories, fine-tuning and noise.
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
        if options is None:
            return None
        ends = ENDS[self.model] if self.bits.endswith("x8") else ()
        overrides = {name: {"activation_bits": 8} for name in ends}
        config = QuantizationConfig(**BITS[self.bits], **options, overrides=overrides)
        if isinstance(config.refine, RefinementConfig):
            return replace(config, refine=replace(config.refine, seed=self.seed))
        return config

    def finetune(self, **guidance: Any) -> FinetuneConfig | None:
        """Return the config of the fine-tuning, None for none.

        Args:
            **guidance: `guidance_branches` and `guidance_rows`, for a guided model.
        """
        options = RECIPES[self.recipe].finetune
        return None if options is None else FinetuneConfig(**options, **guidance, seed=self.seed)


def all_rows() -> list[Row]:
    """Return all rows that can be run; rows that share data are next to each other.

    Example:
        >>> rows = all_rows()
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
    """Return whether a row can be run and makes sense: full precision has no bit widths."""
    if RECIPES[row.recipe].retired:
        return False
    return row.recipe != FULL_PRECISION or row.bits == SETTING[0]
