"""The `quantization_config` of a denoiser's `config.json`: the request and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Self

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from msfp.checkpoint.integrity import KIND
from msfp.checkpoint.migrations import REFINEMENT_BEFORE
from msfp.checkpoint.model_card import Measured
from msfp.config import QuantizationConfig
from msfp.errors import InputError
from msfp.layers.attention import OPERANDS
from msfp.layers.formats import BlockFormats, LayerFormats, narrow_format, read_formats
from msfp.layers.lora.routers import ROUTERS
from msfp.search.coverage import Coverage
from msfp.search.summary import LayerSummary
from msfp.support.checks import check_choice, check_keys, check_names
from msfp.support.container import Header, check_version, migrated

REQUEST = tuple(each.name for each in dataclasses.fields(QuantizationConfig))


class MSFPMethod(str, Enum):  # noqa: UP042 - diffusers formats it as a str
    """The name of the method, in the form that diffusers expects."""

    MSFP = "msfp"


class MSFPConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry in a denoiser's `config.json`: a `QuantizationConfig` and its result.

    Passed to `from_pretrained` with a full-precision model, it quantizes the weights while they are
    loaded. Inputs can then be quantized only to block formats. Other formats need calibration by
    `msfp.quantize`.

    Args:
        layers: The formats of each quantized layer by name; empty before quantization.
        products: The formats of the operands of each quantized attention module by name; empty
            before quantization.
        adapters: Number of weight tensors of each layer, one for each adapter of its hub.
        router: The kind of router that chooses among the adapters.
        summaries: Results of the search for each layer, from `LayerSummary.to_dict`; empty if
            unknown.
        retired: Refinement settings of an earlier version that this version does not have.
        coverage: The weights of the network before it was quantized, from `Coverage.to_dict`; None
            if unknown.
        measured: The error of the predictions, from `Measured.to_dict`; None if it is unknown.
        modules_to_not_convert: Added to `exclude`. This is the name in diffusers.
        format_version: Version of the layout of the file; `from_dict` migrates earlier ones.
        quant_method: "msfp".
        **request: Fields of `QuantizationConfig`. `activation_bits` and `refine` are None by
            default. They must be None if a model is quantized while it is loaded, except for
            `activation_bits` of block formats.

    Attributes:
        request: The `QuantizationConfig`.
        described: The argument of `from_dict`, which the checksum of a file covers; otherwise {}.

    Raises:
        InputError: If a value is out of range, a key is unknown, or the format version is later
            than that of this msfp.

    Example:
        >>> config = MSFPConfig(weight_bits=4, exclude=["time_embedding"])
        >>> config.to_dict()["quant_method"], config.request.exclude
        ('msfp', ('time_embedding',))
        >>> MSFPConfig(format_version=99)
        Traceback (most recent call last):
        msfp.errors.InputError: quantization_config is a quantized denoiser of version 99; this msfp
        reads versions up to 2
    """

    def __init__(
        self,
        *,
        layers: dict[str, dict[str, Any]] | None = None,
        products: dict[str, dict[str, str]] | None = None,
        adapters: int = 1,
        router: str = "learned",
        summaries: Iterable[Mapping[str, Any]] = (),
        retired: Mapping[str, Any] | None = None,
        coverage: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
        modules_to_not_convert: tuple[str, ...] = (),
        format_version: int = KIND.version,
        quant_method: str = MSFPMethod.MSFP.value,
        **request: Any,
    ) -> None:
        check_version("quantization_config", format_version, KIND)
        check_keys("quantization_config", request, REQUEST)
        check_choice("quant_method", quant_method, (MSFPMethod.MSFP.value,))
        if type(adapters) is not int or adapters < 1:
            raise InputError(f"adapters must be a positive integer, not {adapters!r}")
        self.quant_method = MSFPMethod.MSFP
        more = check_names("modules_to_not_convert", modules_to_not_convert)
        request["exclude"] = (*check_names("exclude", request.get("exclude", ())), *more)
        self.request = QuantizationConfig(**{"activation_bits": None, "refine": None} | request)
        check_choice("router", router, ROUTERS)
        self.adapters, self.router = adapters, router
        self.layers = _formats({} if layers is None else layers)
        self.products = _products({} if products is None else products)
        self.summaries = [LayerSummary.from_dict(each) for each in summaries]
        self.retired = dict(retired or {})
        self.coverage = None if coverage is None else Coverage.from_dict(coverage)
        self.measured = None if measured is None else Measured.from_dict(measured)
        self.described: dict[str, Any] = {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **_: Any) -> Self:
        """Return the config from the result of `to_dict`, of this or an earlier version.

        Raises:
            InputError: As `__init__` does.
        """
        version = config_dict.get("format_version", KIND.version)
        check_version("quantization_config", version, KIND)
        current = migrated(Header({}, config_dict), version, KIND).facts
        if isinstance(refine := current.get("refine"), Mapping) and current.get("layers"):
            current = current | {"refine": {**REFINEMENT_BEFORE, **refine}}
        config = cls(**current | {"format_version": KIND.version})
        config.described = config_dict
        return config

    def covered(self) -> Coverage | None:
        """Return the coverage with the bits of the quantized layers, or None if unknown."""
        if self.coverage is None:
            return None
        bits = {name: formats.bits for name, formats in self.layers.items()}
        return self.coverage.with_bits(bits)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments of `__init__` as plain JSON types."""
        summaries = [summary.to_dict() for summary in self.summaries]
        return {
            "quant_method": self.quant_method.value,
            "format_version": KIND.version,
            **self.request.to_dict(),
            "adapters": self.adapters,
            "router": self.router,
            "layers": {name: formats.to_dict() for name, formats in self.layers.items()},
            "products": self.products,
            **({"summaries": summaries} if summaries else {}),
            **({"retired": self.retired} if self.retired else {}),
            **({} if self.coverage is None else {"coverage": self.coverage.to_dict()}),
            **({} if self.measured is None else {"measured": self.measured.to_dict()}),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the values that `repr` shows: those that do not grow with the model.

        diffusers makes a `repr` for its log whenever a config is attached.
        """
        return {"quant_method": self.quant_method.value, **self.request.to_dict()}


def _formats(layers: Any) -> dict[str, LayerFormats | BlockFormats]:
    """Return the formats of layers from a table in a JSON file."""
    if not isinstance(layers, dict):
        raise InputError(f"layers must be a table of formats by name, not {layers!r}")
    formats = {}
    for name, names in layers.items():
        try:
            formats[name] = read_formats(names)
        except InputError as error:
            raise InputError(f"layer {name!r} of quantization_config: {error}") from error
    return formats


def _products(products: Any) -> dict[str, dict[str, str]]:
    """Return the formats of attention's operands from a table in a JSON file."""
    if not isinstance(products, dict):
        raise InputError(f"products must be a table of formats by name, not {products!r}")
    for name, formats in products.items():
        if not isinstance(formats, dict) or set(formats) != set(OPERANDS):
            raise InputError(f"products of {name!r} must have {', '.join(OPERANDS)}: {formats!r}")
        for operand, fmt in formats.items():
            narrow_format(f"{operand} of {name!r}", fmt)
    return products
