"""The README.md of a saved folder: how it is loaded, what was quantized and how, and its error."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from msfp.config import QuantizationConfig, RefinementConfig
from msfp.errors import InputError
from msfp.layers.formats import BlockFormats, LayerFormats
from msfp.search.coverage import Coverage
from msfp.search.summary import LayerSummary
from msfp.support.versions import versions

MOST_FORMATS = 4
"""Number of formats of a network that a card names."""


@dataclass(frozen=True)
class Measured:
    """The error of the predictions of a quantized network.

    Attributes:
        sqnr: Energy of the full-precision predictions over that of the error, in dB.
        samples: Number of samples that were predicted.
    """

    sqnr: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types, None for infinity."""
        return asdict(self) | {"sqnr": self.sqnr if math.isfinite(self.sqnr) else None}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return the error from the result of `to_dict`.

        Raises:
            InputError: If a key is missing or a value is no number.
        """
        try:
            sqnr, samples = values["sqnr"], values["samples"]
            return cls(math.inf if sqnr is None else float(sqnr), int(samples))
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(f"measured must have sqnr and samples, not {values!r}") from error


@dataclass(frozen=True)
class CardFacts:
    """What a card says of one network.

    Attributes:
        kind: Name of its class.
        request: The requested quantization.
        formats: Formats of its quantized layers.
        summaries: Results of the search, if known.
        coverage: Which share is quantized, if known.
        measured: The error of its predictions, if measured.
        bytes: Size of its tensors.
    """

    kind: str
    request: QuantizationConfig
    formats: Mapping[str, LayerFormats | BlockFormats]
    summaries: Iterable[LayerSummary]
    coverage: Coverage | None
    measured: Measured | None
    bytes: int


def model_card(networks: Mapping[str, CardFacts], loader: str, original: str | None = None) -> str:
    """Return the text of a card.

    Args:
        networks: The quantized networks by component.
        loader: The call that loads the folder, such as
            `diffusers.FluxPipeline.from_pretrained("folder")`.
        original: Name of the original on the hub, or None.
    """
    kinds = " and ".join(dict.fromkeys(each.kind for each in networks.values()))
    base = "" if original is None else f"base_model: {original}\n"
    return (
        f"---\nlibrary_name: diffusers\n{base}tags:\n- msfp\n- quantized\n---\n\n"
        f"# {kinds}, quantized by msfp\n\n"
        "It is loaded by diffusers, after `import msfp`:\n\n"
        f"```python\nimport msfp, diffusers\nmodel = {loader}\n```\n\n"
        + "".join(_section(name, facts) for name, facts in networks.items())
        + "## Versions\n\n"
        + "".join(f"- {name} {value}\n" for name, value in versions().items())
    )


def _section(name: str, facts: CardFacts) -> str:
    """Return the section of one network."""
    lines = [f"{len(facts.formats)} layers, {facts.bytes / 1e6:.2f} MB."]
    lines += [] if facts.coverage is None else facts.coverage.sentences()
    formats = facts.formats.values()
    lines += [
        f"Formats of weights (number of layers): {_counted(each.weight for each in formats)}.",
        f"Formats of inputs (number of layers): {_counted(each.input for each in formats)}.",
        f"Scheme `{facts.request.scheme}`; {_refinement(facts.request)}.",
    ]
    if facts.request.budget is not None:
        lines.append(f"Bits and ranks were chosen for a budget of {_budget(facts.request.budget)}.")
    if facts.request.attention_bits is not None:
        lines.append(f"Products of attention: {facts.request.attention_bits} bits.")
    lines += _errors(facts)
    return f"## {name or facts.kind}\n\n" + "".join(f"- {line}\n" for line in lines) + "\n"


def _budget(budget: float | str) -> str:
    return budget if isinstance(budget, str) else f"{budget:g} bits for each weight"


def _counted(formats: Iterable[Any]) -> str:
    """Return formats with their numbers of layers, the most frequent ones first."""
    counts = Counter("none" if each is None else str(each) for each in formats).most_common()
    said = [f"{name} ({count})" for name, count in counts[:MOST_FORMATS]]
    more = sum(count for _, count in counts[MOST_FORMATS:])
    return ", ".join(said + ([f"others ({more})"] if more else []))


def _refinement(request: QuantizationConfig) -> str:
    """Return in words how weights were corrected."""
    refine = request.refine
    if not isinstance(refine, RefinementConfig):
        return "each weight is rounded to nearest"
    branch = f", branches of rank {refine.branch_rank}" if refine.branch_rank else ""
    if branch and request.budget is not None:
        branch = ", branches of the ranks that the budget chose"
    return f"weights are refined ({refine.rounding}{branch})"


def _errors(facts: CardFacts) -> list[str]:
    """Return the measured errors in words."""
    found = []
    weights = [each.weight_sqnr for each in facts.summaries if math.isfinite(each.weight_sqnr)]
    inputs = [each.input_sqnr for each in facts.summaries if math.isfinite(each.input_sqnr)]
    for name, ratios in (("weights", weights), ("inputs", inputs)):
        if ratios:
            found.append(
                f"Signal-to-quantization-noise ratio of {name}, as searched: median "
                f"{statistics.median(ratios):.1f} dB, least {min(ratios):.1f} dB."
            )
    if facts.measured is None:
        found.append("The error of the predictions was not measured.")
    else:
        found.append(
            f"Signal-to-quantization-noise ratio of the predictions, on {facts.measured.samples} "
            f"samples of the calibration calls: {facts.measured.sqnr:.1f} dB."
        )
    return found
