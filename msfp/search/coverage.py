"""Which share of a network is quantized, and what stays in full precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn

from msfp.errors import InputError

FULL = 0
"""The key of what is not quantized, in place of a number of bits."""
NAMED = 3
"""Number of modules that a sentence names."""


@dataclass(frozen=True)
class Weight:
    """The weights of a module.

    Attributes:
        kind: Name of the module's class.
        parameters: Number of parameters.
        multiply_adds: Number of multiply-adds in a forward, or None if unknown.
    """

    kind: str
    parameters: int
    multiply_adds: int | None = None


@dataclass(frozen=True)
class Coverage:
    """The weights of a network, by module.

    Attributes:
        parameters: Number of parameters of the network.
        multiply_adds: Number of multiply-adds of a forward, with those of attention's products; or
            None if unknown.
        weights: The modules that have matrices.
        bits: Bits of the weights of quantized layers.
    """

    parameters: int
    multiply_adds: int | None
    weights: Mapping[str, Weight]
    bits: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module, counts: Mapping[str, int] | None = None) -> Self:
        """Return the coverage of a network before it is quantized.

        Args:
            network: The network, in full precision.
            counts: Multiply-adds by the name of the weight, as of `Calibration`; None if unknown.

        Example:
            >>> network = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
            >>> found = Coverage.of(network, {"0.weight": 32})
            >>> found.parameters, found.multiply_adds, list(found.weights)
            (44, 32, ['0'])
        """
        weights: dict[str, Weight] = {}
        total = 0
        for name, parameter in network.named_parameters():
            total += parameter.numel()
            module, _, _ = name.rpartition(".")
            if parameter.dim() < 2:
                continue
            before = weights.get(module, Weight(type(network.get_submodule(module)).__name__, 0, 0))
            adds = None if counts is None else (before.multiply_adds or 0) + counts.get(name, 0)
            weights[module] = Weight(before.kind, before.parameters + parameter.numel(), adds)
        return cls(total, None if counts is None else sum(counts.values()), weights)

    def with_bits(self, bits: Mapping[str, int]) -> Self:
        """Return the coverage with the bits of the quantized layers."""
        return type(self)(self.parameters, self.multiply_adds, self.weights, dict(bits))

    def shares(self) -> dict[int, tuple[float, float | None]]:
        """Return the shares of parameters and of multiply-adds by bits, the fewest bits first.

        The key 0 stands for full precision and comes last.

        Example:
            >>> found = Coverage.of(nn.Sequential(nn.Linear(8, 4)), {"0.weight": 32})
            >>> found.with_bits({"0": 4}).shares()[4] == (32 / 36, 1.0)
            True
        """
        counts = {width: [0, 0] for width in sorted(set(self.bits.values()))}
        for name, width in self.bits.items():
            weight = self.weights.get(name, Weight("", 0))
            counts[width][0] += weight.parameters
            counts[width][1] += weight.multiply_adds or 0
        known = list(counts.values())
        counts[FULL] = [
            self.parameters - sum(each[0] for each in known),
            (self.multiply_adds or 0) - sum(each[1] for each in known),
        ]
        return {
            width: (
                parameters / max(1, self.parameters),
                None if self.multiply_adds is None else adds / max(1, self.multiply_adds),
            )
            for width, (parameters, adds) in counts.items()
        }

    def left(self) -> dict[str, Weight]:
        """Return the modules that stay in full precision, the largest first."""
        rest = {name: each for name, each in self.weights.items() if name not in self.bits}
        return dict(sorted(rest.items(), key=lambda item: -item[1].parameters))

    def sentences(self) -> list[str]:
        """Return the shares in words, and then what stays in full precision.

        Example:
            >>> network = nn.Sequential(nn.Linear(8, 4), nn.Embedding(5, 8))
            >>> for each in Coverage.of(network, {"0.weight": 32}).with_bits({"0": 4}).sentences():
            ...     print(each)
            4 bits: 42% of parameters, 100% of multiply-adds.
            Full precision: 58% of parameters, 0% of multiply-adds, among them 1 (Embedding).
        """
        left = self.left()
        named = [f"{name or 'the network'} ({each.kind})" for name, each in left.items()][:NAMED]
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        among = f", among them {', '.join(named)}{more}" if named else ""
        found = []
        for width, (parameters, adds) in self.shares().items():
            name = "Full precision" if width == FULL else f"{width} bits"
            share = "" if adds is None else f", {adds:.0%} of multiply-adds"
            found.append(
                f"{name}: {parameters:.0%} of parameters{share}{among if width == FULL else ''}."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types, without the bits."""
        return {
            "parameters": self.parameters,
            "multiply_adds": self.multiply_adds,
            "weights": {
                name: [each.kind, each.parameters, each.multiply_adds]
                for name, each in self.weights.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return the coverage from the result of `to_dict`.

        Raises:
            InputError: If a key is missing or a value has the wrong type.

        Example:
            >>> found = Coverage.of(nn.Sequential(nn.Linear(8, 4)))
            >>> Coverage.from_dict(found.to_dict()) == found
            True
        """
        try:
            numbers = [values["parameters"], values["multiply_adds"]]
            weights = {name: Weight(*each) for name, each in values["weights"].items()}
        except (LookupError, TypeError, AttributeError) as error:
            raise InputError(f"coverage must be a table of weights, not {values!r}") from error
        for each in weights.values():
            numbers += [each.parameters, each.multiply_adds]
        if not all(number is None or type(number) is int for number in numbers):
            raise InputError("coverage must have whole numbers of parameters and multiply_adds")
        return cls(values["parameters"], values["multiply_adds"], weights)


def together(parts: Iterable[tuple[str, Coverage]]) -> Coverage:
    """Return the coverage of several networks, whose names come before those of their modules."""
    found = list(parts)
    if len(found) == 1:
        return found[0][1]
    known = [each.multiply_adds for _, each in found]
    return Coverage(
        sum(each.parameters for _, each in found),
        None if None in known else sum(each or 0 for each in known),
        {f"{part}.{name}": each for part, one in found for name, each in one.weights.items()},
        {f"{part}.{name}": bits for part, one in found for name, bits in one.bits.items()},
    )
