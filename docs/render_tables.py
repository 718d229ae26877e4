"""Put tables into the pages of documentation, from the records of the study.

python docs/render_tables.py
"""

import re
from pathlib import Path

from msfp.experiments.study.ablation import MODELS, RECIPES, SETTING
from msfp.experiments.study.groups import ERROR, Group, comparisons
from msfp.experiments.study.store import Store
from msfp.experiments.study.tables import MARGINS, cell, label, markdown_table, verdict

DOCS = Path(__file__).parent
METHODS = (
    "mixup", "last-bias", "all-biases", "gptq", "gptq-sweeps", "adaround", "matched-nearest",
    "matched", "matched-sweeps", "matched-adaround", "split", "pure", "pure-tokens",
    "pure-rotated", "pure-tokens-rotated", "branch-4", "branch-16", "samples-256",
    "branch-16-int8", "tokens", "rotated", "tokens-rotated", "default", "nvfp4", "nvfp4-pure",
    "nvfp4_int4-pure", "nvfp4-refined", "nvfp4_int4-refined",
)  # fmt: skip
"""Recipes of the table of methods, in its order."""
INGREDIENTS = (
    ("lora", "mixup"), ("lora", "fixed-lora"), ("long-lora", "lora"),
    ("branch-16-lora", "branch-16"), ("samples-256-lora", "samples-256"),
    ("segments-2", "lora"), ("talora-2", "lora"), ("talora-4", "lora"), ("dfa-1", "lora"),
    ("dfa-2", "lora"), ("svd-lora", "lora"), ("own-path-lora", "lora"),
    ("matched-lora", "lora"), ("branch-16-talora-2", "branch-16-lora"),
    ("conditioned-talora-2", "talora-2"), ("annealed-talora-2", "talora-2"),
    ("narrow-talora-2", "narrow-lora"), ("long-talora-2", "long-lora"),
)  # fmt: skip
"""What is added in fine-tuning, and to what: first what helps, then what was hoped to."""
COLUMNS = ("digits", "transformer", "photographs")
"""What the reference models are called."""


def group_of(model: str) -> Group:
    """Return the records of a model at the setting of all recipes."""
    setting = {"model": model, "training": 0}
    setting |= dict(zip(("bits", "sampler", "steps"), SETTING, strict=True))
    records = Store(DOCS / "results").records().values()
    return Group([each for each in records if setting.items() <= each["row"].items()])


def methods() -> str:
    """Return the table of what is done to weights before fine-tuning."""
    groups = [group_of(model) for model in MODELS]
    rows = []
    for recipe in METHODS:
        means = [cell(group.mean(recipe, ERROR), 2) for group in groups]
        means += [cell(group.mean(recipe, "psnr"), 1) for group in groups]
        counts = [str(len(group.values(recipe, ERROR)) or "-") for group in groups]
        taken = groups[0].seconds(recipe, "quantize")
        seconds = "" if taken is None else f"{taken:.1f}"
        rows.append([label(recipe), *means, seconds, ", ".join(counts)])
    columns = [f"{of}, {name}" for of in ("error", "PSNR") for name in COLUMNS]
    return markdown_table(("method", *columns, "CPU seconds, digits", "seeds"), rows)


def ingredients() -> str:
    """Return the table of what each ingredient of fine-tuning changes."""
    # Each model's tests are a family by themselves, as on the page of results.
    found = [comparisons({"": group_of(model)}, tuple(MARGINS)) for model in MODELS]
    rows = []
    for recipe, against in INGREDIENTS:
        for measure, name in ((ERROR, "error"), ("psnr", "PSNR")):
            cells = [verdict(tests.get((recipe, against, "", measure)), measure) for tests in found]
            rows.append([RECIPES[recipe].title, RECIPES[against].title, name, *cells])
    return markdown_table(("recipe", "against", "of", *COLUMNS), rows)


def main() -> None:
    """Replace what stands between the markers of each page."""
    for name, table in (("methods", methods()), ("fine-tuning", ingredients())):
        page = DOCS / f"{name}.md"
        old, new = r"(<!-- table -->\n).*?(<!-- end -->)", rf"\g<1>{table}\g<2>"
        page.write_text(re.sub(old, new, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
