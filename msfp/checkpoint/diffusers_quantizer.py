"""msfp as a quantization method of diffusers: `quant_method: "msfp"`.

`import msfp` registers it. After that, diffusers' own `save_pretrained` and `from_pretrained` save
and load quantized denoisers. `from_pretrained(..., quantization_config=MSFPConfig(...))` quantizes
a full-precision denoiser while it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from diffusers import ConfigMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from msfp.checkpoint.diffusers_config import MSFPConfig
from msfp.checkpoint.integrity import as_stored, check_names, describe, verify
from msfp.checkpoint.model_card import Measured
from msfp.checkpoint.placeholders import make_room
from msfp.config import LayerSettings, QuantizationConfig
from msfp.errors import InputError
from msfp.layers.attention import make_room_for_products, product_formats, remove_products
from msfp.layers.base import quantized_layers
from msfp.layers.float32 import Float32Module
from msfp.layers.lora.talora import router_of
from msfp.layers.packed import dequantized, packed_layers
from msfp.layers.selection import refuse_additions, replace_layers, settings_by_layer
from msfp.layers.trainable import trainable_layers
from msfp.layers.weight_lookup import add_weight_lookup
from msfp.search.coverage import Coverage
from msfp.search.layer_search import pack_layer
from msfp.search.summary import LayerSummary


class MSFPQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Loads packed denoisers, and quantizes weights that are loaded in full precision."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: MSFPConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: MSFPConfig = quantization_config
        # `from_single_file` says that all files are quantized; those have a config of their own.
        self.pre_quantized &= bool(quantization_config.layers or quantization_config.described)
        self._dtype = torch.float32
        self._float32_modules: list[str] = []
        self._loaded: set[str] = set()
        self._settings: dict[str, LayerSettings] = {}
        self._summaries: dict[str, LayerSummary] = {}
        self._coverage: Coverage | None = None
        for name in () if self.pre_quantized else ("refine", "attention_bits"):
            if getattr(quantization_config.request, name) is not None:
                raise _takes_calibration(name)

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse a device map that sends modules to a disk."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise InputError(
                "device_map must not send modules to a disk: give max_memory more, or leave it out"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Store the dtype of everything that is not quantized."""
        self._dtype = torch_dtype or torch.float32
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], files: list[str]) -> list[str]:
        """Check that a packed checkpoint is complete and unchanged."""
        if self.pre_quantized:
            config = self.quantization_config
            verify(files, config.described, config.layers, config.products)
        self._loaded = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str], **_: Any
    ) -> None:
        """Insert empty packed layers, or select the weights to quantize."""
        self._float32_modules = keep_in_fp32_modules
        config = self.quantization_config
        if self.pre_quantized:
            make_room(model, config.layers, config.adapters, config.router)
            make_room_for_products(model, config.products)
        else:
            self._coverage = Coverage.of(model)
            self._settings = settings_by_layer(model, config.request)
            if any(each.needs_calibration for each in self._settings.values()):
                raise _takes_calibration("activation_bits")

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Refuse packed checkpoints with missing or unexpected tensors."""
        del prefix
        if self.pre_quantized:
            check_names(set(model.state_dict()), self._loaded)
        return missing_keys

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        *_rest: Any,
        **_others: Any,
    ) -> bool:
        """Return whether a tensor is to be quantized, or belongs to a module that stays float32."""
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
        """Set a weight to the numbers in the file, not to those that diffusers has cast."""
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
        """Set the compute dtype of the layers, and attach the quantization config."""
        layers = packed_layers(model)
        missing = self._settings.keys() - layers
        if missing:
            raise InputError(f"the weight of layer {min(missing)!r} was not loaded")
        for name, layer in layers.items():
            kept = any(part in self._float32_modules for part in name.split("."))
            layer.dtype = torch.float32 if kept else self._dtype
            for factor in (layer.branch_down, layer.branch_up):
                if factor is not None:  # a mapped file is unaligned, which can change products
                    factor.data = factor.data.to(layer.dtype, copy=True)
        config = self.quantization_config
        # The order of tensors in files differs from that of layers.
        found = [self._summaries[name] for name in layers if name in self._summaries]
        attach(
            model, config.request, self, summaries=found or config.summaries,
            retired=config.retired, coverage=self._coverage or config.coverage,
            measured=config.measured,
        )  # fmt: skip
        # diffusers refuses to cast models marked as quantized, but packed layers can be cast.
        model.is_quantized = False  # type: ignore[assignment]

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, torch.Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors and the metadata of a safetensors file."""
        if not safe_serialization:
            raise InputError("safe_serialization must be True: msfp writes safetensors alone")
        config = self.quantization_config
        unpacked = next((n for n in config.layers if f"{n}.codes" not in state_dict), None)
        if unpacked is not None:
            raise InputError(
                f"layer {unpacked!r} has no packed codes: pack the denoiser before it is saved, "
                "and save LoRA adapters by themselves"
            )
        refuse_additions(state_dict)
        away = next((name for name, tensor in state_dict.items() if tensor.is_meta), None)
        if away is not None:
            raise InputError(
                f"tensor {away!r} is offloaded: call remove_all_hooks() on the pipeline before it "
                "is saved"
            )
        tensors = as_stored(state_dict)
        return tensors, describe(tensors, config.to_dict())

    def _dequantize(self, model: nn.Module) -> nn.Module:
        """Replace quantized layers by plain layers with dequantized weights."""
        config = self.quantization_config
        for name in trainable_layers(model):
            raise InputError(f"layer {name!r} is trainable: call msfp.pack before dequantize()")
        if config.adapters > 1:
            raise InputError(
                f"a denoiser with {config.adapters} weights for each layer cannot be dequantized: "
                "its router chooses among them at each timestep"
            )
        layers = packed_layers(model)
        replace_layers(model, {layer: dequantized(layer) for layer in layers.values()})
        remove_products(model)
        detach(model)
        return model


def refuse_transformers(*_: Any, **__: Any) -> NoReturn:
    """Raise InputError, in place of a quantizer for models of transformers."""
    raise InputError(
        "msfp quantizes models of diffusers, and no text encoders of transformers: name those of "
        "diffusers in components_to_quantize or quant_mapping"
    )


def _takes_calibration(name: str) -> InputError:
    """Return the error for a setting that needs calibration."""
    return InputError(
        f"{name} must be None when a model is quantized while it is loaded: it needs calibration "
        "(see msfp.quantize)"
    )


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """Return a module, by its dotted name, and the modules around it except the model itself."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts) + 1)]


def attach(
    denoiser: nn.Module,
    request: QuantizationConfig,
    quantizer: MSFPQuantizer | None = None,
    *,
    summaries: Iterable[LayerSummary],
    retired: Mapping[str, Any] | None = None,
    coverage: Coverage | None = None,
    measured: Measured | None = None,
) -> None:
    """Attach the quantization config to a denoiser: diffusers needs it to save and dequantize.

    Args:
        denoiser: A network with quantized layers.
        request: The requested quantization.
        quantizer: The quantizer that loaded it, or None for a new one.
        summaries: Results of the search, if known.
        retired: As in `MSFPConfig`.
        coverage: The weights of the network before it was quantized, if known.
        measured: The error of its predictions, if measured.
    """
    layers = quantized_layers(denoiser)
    adapters = max((layer.choices for layer in layers.values()), default=1)
    formats = {name: layer.formats for name, layer in layers.items() if layer.formats}
    router = router_of(denoiser).kind if adapters > 1 else "learned"
    config = MSFPConfig(
        **request.to_dict(), adapters=adapters, router=router,
        layers={name: each.to_dict() for name, each in formats.items()},
        products=product_formats(denoiser),
        summaries=[each.with_formats(formats.get(each.name)).to_dict() for each in summaries],
        retired=retired,
        coverage=None if coverage is None else coverage.to_dict(),
        measured=None if measured is None else measured.to_dict(),
    )  # fmt: skip
    quantizer = MSFPQuantizer(config) if quantizer is None else quantizer
    quantizer.quantization_config = config
    denoiser.hf_quantizer = quantizer
    if isinstance(denoiser, ConfigMixin):
        denoiser.register_to_config(quantization_config=config)
        add_weight_lookup(denoiser)


def attach_again(denoiser: nn.Module, *, same_outputs: bool = False, **changes: Any) -> None:
    """Update the quantization config of a denoiser, if it has one.

    Args:
        denoiser: A network whose quantized layers or products have changed.
        same_outputs: Whether its outputs are the same, so that its measured error is kept.
        **changes: Fields of the request that have changed.
    """
    quantizer: MSFPQuantizer | None = getattr(denoiser, "hf_quantizer", None)
    if quantizer is not None:
        config = quantizer.quantization_config
        request = replace(config.request, **changes)
        attach(
            denoiser, request, summaries=config.summaries, retired=config.retired,
            coverage=config.coverage, measured=config.measured if same_outputs else None,
        )  # fmt: skip


def detach(denoiser: nn.Module) -> None:
    """Remove the quantization config from a denoiser."""
    if isinstance(denoiser, ConfigMixin):
        kept = {k: v for k, v in denoiser.config.items() if k != "quantization_config"}
        denoiser._internal_dict = type(denoiser.config)(kept)
