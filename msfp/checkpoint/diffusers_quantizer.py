"""msfp as a quantization method of diffusers: `quant_method: "msfp"`.

`import msfp` registers it. From then on a quantized denoiser is saved and loaded by diffusers' own
`save_pretrained` and `from_pretrained`, and a full-precision one is quantized as it is loaded with
`from_pretrained(..., quantization_config=MSFPConfig(...))`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, get_args

import torch
from diffusers import ConfigMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import is_transformers_available
from torch import nn

from msfp.checkpoint.integrity import FORMAT_VERSION, check_version, metadata, verify
from msfp.checkpoint.placeholders import make_room
from msfp.checkpoint.stored_tensors import as_stored
from msfp.config import (
    FIRST_LAYERS,
    LAST_LAYERS,
    Granularity,
    LayerSettings,
    QuantizationConfig,
    RefinementConfig,
    Scheme,
    check_choice,
    check_names,
)
from msfp.errors import InputError
from msfp.layers.attention import (
    OPERANDS,
    make_room_for_products,
    product_formats,
    remove_products,
)
from msfp.layers.base import quantized_layers
from msfp.layers.float32 import Float32Module
from msfp.layers.formats import BlockFormats, LayerFormats, narrow_format, read_formats
from msfp.layers.lora.routers import RouterKind
from msfp.layers.lora.talora import router_of
from msfp.layers.packed import dequantized, sealed_layers
from msfp.pipelines.denoiser import replace_layers, settings_by_layer
from msfp.search.layer_search import pack_layer
from msfp.search.summary import LayerSummary


class MSFPMethod(str, Enum):  # noqa: UP042 - diffusers formats it as a str
    """The name of the method, as diffusers wants it."""

    MSFP = "msfp"


class MSFPConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What is written to a denoiser's `config.json`: a `QuantizationConfig` and its outcome.

    Given to `from_pretrained` with a full-precision model, it quantizes the weights as they are
    loaded; inputs take calibration, which is what `msfp.quantize` does, but for those in blocks.

    Args:
        weights: As in `QuantizationConfig`.
        activations: As in `QuantizationConfig`; None for weights alone, which it must be where a
            model is quantized as it is loaded and the scheme is not one of blocks.
        first_last: As in `QuantizationConfig`.
        scheme: As in `QuantizationConfig`.
        include: As in `QuantizationConfig`.
        exclude: As in `QuantizationConfig`.
        first: As in `QuantizationConfig`.
        last: As in `QuantizationConfig`.
        granularity: As in `QuantizationConfig`.
        overrides: As in `QuantizationConfig`.
        refine: As in `QuantizationConfig`; None where a model is quantized as it is loaded.
        attention: As in `QuantizationConfig`; likewise.
        modules_to_not_convert: More of `exclude`, by the name that diffusers has for it.
        layers: The formats of each quantized layer by name, empty before there are any.
        products: The formats of the operands of each quantized attention module, likewise.
        entries: Weights of each layer, one for each LoRA of its hub.
        router: The kind of router that chooses among them.
        summaries: What the search decided for layers and what else it could have, as of
            `LayerSummary.to_dict`; empty where that is not known.
        format_version: Version of the layout of the file.
        **kwargs: `quant_method`, and nothing else.

    Raises:
        InputError: If a value is out of range, a key unknown or the format version another.

    Example:
        >>> config = MSFPConfig(weights=4, exclude=["time_embedding"])
        >>> config.to_dict()["quant_method"], config.request.exclude
        ('msfp', ('time_embedding',))
        >>> MSFPConfig(format_version=99)
        Traceback (most recent call last):
        msfp.errors.InputError: quantization_config has format version 99, this msfp reads 1
    """

    def __init__(
        self,
        weights: int = 4,
        activations: int | None = None,
        first_last: int = 8,
        scheme: Scheme = "mixup",
        include: tuple[str, ...] = ("*",),
        exclude: tuple[str, ...] = (),
        first: tuple[str, ...] = FIRST_LAYERS,
        last: tuple[str, ...] = LAST_LAYERS,
        granularity: Granularity = "channel",
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        refine: RefinementConfig | Mapping[str, Any] | None = None,
        attention: int | None = None,
        modules_to_not_convert: tuple[str, ...] = (),
        layers: dict[str, dict[str, Any]] | None = None,
        products: dict[str, dict[str, str]] | None = None,
        entries: int = 1,
        router: RouterKind = "learned",
        summaries: Iterable[Mapping[str, Any]] = (),
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        check_version("quantization_config has", format_version)
        unknown = kwargs.keys() - {"quant_method"}
        if unknown:
            raise InputError(f"quantization_config has unknown keys: {sorted(unknown)}")
        if type(entries) is not int or entries < 1:
            raise InputError(f"entries must be a positive integer, not {entries!r}")
        self.quant_method = MSFPMethod.MSFP
        more = check_names("modules_to_not_convert", modules_to_not_convert)
        exclude = (*check_names("exclude", exclude), *more)
        self.request = QuantizationConfig(
            weights, activations, first_last, scheme, include, exclude, first, last, granularity,
            {} if overrides is None else overrides, refine, attention,  # type: ignore[arg-type]
        )  # fmt: skip
        check_choice("router", router, get_args(RouterKind))
        self.entries, self.router = entries, router
        self.layers = _formats({} if layers is None else layers)
        self.products = _products({} if products is None else products)
        self.summaries = [LayerSummary.from_dict(each) for each in summaries]

    def to_dict(self) -> dict[str, Any]:
        """Return what `__init__` takes, as plain JSON types."""
        summaries = [summary.to_dict() for summary in self.summaries]
        return {
            "quant_method": self.quant_method.value,
            "format_version": FORMAT_VERSION,
            **self.request.to_dict(),
            "entries": self.entries,
            "router": self.router,
            "layers": {name: formats.to_dict() for name, formats in self.layers.items()},
            "products": self.products,
            **({"summaries": summaries} if summaries else {}),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `repr` shows."""
        return self.to_dict()


def _formats(layers: Any) -> dict[str, LayerFormats | BlockFormats]:
    """Return the formats of layers from those of a JSON file."""
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
    """Return the formats of attention's operands from those of a JSON file."""
    if not isinstance(products, dict):
        raise InputError(f"products must be a table of formats by name, not {products!r}")
    for name, formats in products.items():
        if not isinstance(formats, dict) or set(formats) != set(OPERANDS):
            raise InputError(f"products of {name!r} must have {', '.join(OPERANDS)}: {formats!r}")
        for operand, fmt in formats.items():
            narrow_format(f"{operand} of {name!r}", fmt)
    return products


class MSFPQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Loads packed denoisers, and quantizes weights that are loaded in full precision."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: MSFPConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: MSFPConfig = quantization_config
        self._dtype = torch.float32
        self._float32_modules: list[str] = []
        self._loaded: set[str] = set()
        self._settings: dict[str, LayerSettings] = {}
        self._summaries: dict[str, LayerSummary] = {}
        for name in () if self.pre_quantized else ("refine", "attention"):
            if getattr(quantization_config.request, name) is not None:
                raise _takes_calibration(name)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Remember the dtype of what is not quantized."""
        self._dtype = torch_dtype or torch.float32
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], files: list[str]) -> list[str]:
        """Check that a packed checkpoint is whole."""
        if self.pre_quantized:
            verify(files, self.quantization_config.to_dict())
        self._loaded = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str], **_: Any
    ) -> None:
        """Make room for codes, or plan which weights to quantize."""
        self._float32_modules = keep_in_fp32_modules
        config = self.quantization_config
        if self.pre_quantized:
            make_room(model, config.layers, config.entries, config.router)
            make_room_for_products(model, config.products)
        else:
            self._settings = settings_by_layer(model, config.request)
            if any(each.needs_calibration for each in self._settings.values()):
                raise _takes_calibration("activations")

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Refuse packed checkpoints with tensors missing or left over."""
        del prefix
        if self.pre_quantized:
            check_keys(set(model.state_dict()), self._loaded)
        return missing_keys

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        *_rest: Any,
        **_others: Any,
    ) -> bool:
        """Return whether a tensor is to be quantized, or is of a module that stays float32."""
        del param_value
        layer, _, leaf = param_name.rpartition(".")
        if self.pre_quantized:
            return any(isinstance(each, Float32Module) for each in _around(model, layer))
        return leaf == "weight" and layer in self._settings

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device | str | int | None,
        state_dict: dict[str, torch.Tensor],
        *_rest: Any,
        **_others: Any,
    ) -> None:
        """Put a weight in its place, from the file's own numbers and not those cast on the way."""
        del param_value
        value = state_dict[param_name].to(target_device)
        name, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(name)
        if self.pre_quantized:
            setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
            return
        packed, self._summaries[name] = pack_layer(name, layer, value, self._settings[name])
        replace_layers(model, {layer: packed})

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        """Tell layers their dtype, and write down what was quantized."""
        layers = sealed_layers(model)
        missing = self._settings.keys() - layers
        if missing:
            raise InputError(f"the weight of layer {min(missing)!r} was not loaded")
        for name, layer in layers.items():
            kept = any(part in self._float32_modules for part in name.split("."))
            layer.dtype = torch.float32 if kept else self._dtype
            for factor in (layer.branch_down, layer.branch_up):
                if factor is not None:  # a mapped file is not aligned, which products may show
                    factor.data = factor.data.to(layer.dtype, copy=True)
        config = self.quantization_config
        # Files have tensors in an order of their own.
        found = [self._summaries[name] for name in layers if name in self._summaries]
        attach(model, config.request, self, summaries=found or config.summaries)
        # Marked as quantized, diffusers would refuse to cast it; packed layers can be cast.
        model.is_quantized = False  # type: ignore[assignment]

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, torch.Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return what to write to a safetensors file, and what it is to say of itself."""
        if not safe_serialization:
            raise InputError("safe_serialization must be True: msfp writes safetensors alone")
        config = self.quantization_config
        open_layer = next((n for n in config.layers if f"{n}.codes" not in state_dict), None)
        if open_layer is not None:
            raise InputError(
                f"layer {open_layer!r} has no packed codes: seal the denoiser before it is saved, "
                "and save LoRA adapters by themselves"
            )
        tensors = as_stored(state_dict)
        return tensors, metadata(tensors, config.to_dict())

    def _dequantize(self, model: nn.Module) -> nn.Module:
        """Put plain layers with dequantized weights in the place of quantized ones."""
        config = self.quantization_config
        if config.entries > 1:
            raise InputError(
                f"a denoiser with {config.entries} weights for each layer cannot be dequantized: "
                "its router chooses among them at each timestep"
            )
        layers = sealed_layers(model)
        replace_layers(model, {layer: dequantized(layer) for layer in layers.values()})
        remove_products(model)
        detach(model)
        return model


def _takes_calibration(name: str) -> InputError:
    """Return what to say of a setting that takes more than the weights."""
    return InputError(
        f"{name} must be None where a model is quantized as it is loaded: it takes calibration, "
        "see msfp.quantize"
    )


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """Return a module by its dotted name and the modules around it, but for the model itself."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts) + 1)]


def check_keys(expected: set[str], given: set[str]) -> None:
    """Raise InputError unless a checkpoint has the tensors that its config asks for."""
    if expected - given:
        raise InputError(f"tensors are missing: {sorted(expected - given)[:3]}")
    if given - expected:
        raise InputError(f"tensors are left over: {sorted(given - expected)[:3]}")


def attach(
    denoiser: nn.Module,
    request: QuantizationConfig,
    quantizer: MSFPQuantizer | None = None,
    *,
    summaries: Iterable[LayerSummary],
) -> None:
    """Tell diffusers how a denoiser is quantized, so that it can save and dequantize it.

    Args:
        denoiser: A network with quantized layers.
        request: What was asked for.
        quantizer: The quantizer that loaded it, or None for a new one.
        summaries: What the search decided, where that is known.
    """
    layers = quantized_layers(denoiser)
    entries = max((layer.choices for layer in layers.values()), default=1)
    formats = {name: layer.formats for name, layer in layers.items() if layer.formats}
    router = router_of(denoiser).kind if entries > 1 else "learned"
    config = MSFPConfig(
        **request.to_dict(), entries=entries, router=router,
        layers={name: each.to_dict() for name, each in formats.items()},
        products=product_formats(denoiser),
        summaries=[each.with_formats(formats.get(each.name)).to_dict() for each in summaries],
    )  # fmt: skip
    quantizer = MSFPQuantizer(config) if quantizer is None else quantizer
    quantizer.quantization_config = config
    denoiser.hf_quantizer = quantizer
    if isinstance(denoiser, ConfigMixin):
        denoiser.register_to_config(quantization_config=config)


def attach_anew(denoiser: nn.Module, **changes: Any) -> None:
    """Tell diffusers how a denoiser is quantized now, where it was told before.

    Args:
        denoiser: A network whose quantized layers or products have changed.
        **changes: Fields of the request that are others now.
    """
    quantizer: MSFPQuantizer | None = getattr(denoiser, "hf_quantizer", None)
    if quantizer is not None:
        config = quantizer.quantization_config
        attach(denoiser, replace(config.request, **changes), summaries=config.summaries)


def detach(denoiser: nn.Module) -> None:
    """Make diffusers forget that a denoiser was quantized."""
    if isinstance(denoiser, ConfigMixin):
        kept = {k: v for k, v in denoiser.config.items() if k != "quantization_config"}
        denoiser._internal_dict = type(denoiser.config)(kept)


def register() -> None:
    """Make `quant_method: "msfp"` known to diffusers.

    Transformers must know the config too, or `PipelineQuantizationConfig(quant_backend="msfp")`
    refuses it; its models are not quantized.
    """
    auto.AUTO_QUANTIZER_MAPPING[MSFPMethod.MSFP.value] = MSFPQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[MSFPMethod.MSFP.value] = MSFPConfig
    if is_transformers_available():
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

        AUTO_QUANTIZATION_CONFIG_MAPPING[MSFPMethod.MSFP.value] = MSFPConfig
