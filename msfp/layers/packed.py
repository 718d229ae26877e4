"""Packed linear and convolution layers, with packed weights and quantized inputs.

A quantized layer (`msfp.layers.base`) is trainable or packed. A trainable layer
(`msfp.layers.trainable`) has the full-precision weight and can be trained. A packed layer has only
packed codes and scales. Only packed layers are saved. This module has the packed layers with one
scale for each output channel; `msfp.layers.block` has those with one scale for each block.

Scales are stored as the bits of float32 numbers in int32 tensors. Neither `model.half()` nor a
loader's cast can then round them.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats import decode_scaled, encode_scaled, quantize_scaled
from msfp.errors import InputError
from msfp.layers.base import QuantizedLayer, quantized_layers
from msfp.layers.execution.backends import runs_on_integers
from msfp.layers.execution.grids import IntegerGrids, integer_grids, to_whole, whole_steps
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.formats import CHANNEL, BlockFormats, LayerFormats
from msfp.layers.kinds import groups_of, plain_class
from msfp.layers.lora.routers import Router
from msfp.layers.lora.talora import attach_router
from msfp.pipelines.denoiser import denoisers_of, networks_of
from msfp.support.checks import check_truth

Layer = TypeVar("Layer", bound=nn.Module)
DESCRIPTION = ("__get__", "dim", "numel", "size")
"""The functions that only describe a tensor; `__get__` reads its attributes."""
GRIDS = "grids"
NARROW = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class DequantizedWeight(torch.Tensor):
    """The weight of a packed layer for other code: a copy, which cannot change the layer."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """The description of the weight, such as its shape, without its numbers."""
        return self.as_subclass(WeightDescription)


class WeightDescription(torch.Tensor):
    """The `data` of a packed weight: diffusers reads its shape and dtype, which is allowed.

    Its numbers cannot be used. A change, such as merging a LoRA, would be lost in the copy, and
    projections fused from copies would not be quantized.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what describes the weight; raise InputError for everything else."""
        if func.__name__ in DESCRIPTION:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        raise InputError(
            "the weight of a quantized layer is packed: nothing can be merged into it or fused "
            "with it; keep LoRAs beside it, or call dequantize() on the denoiser first"
        )


class PackedLayer(QuantizedLayer):
    """A layer that has packed codes and dequantizes them at each forward.

    A new layer is a plain layer of its nn class until it gets formats, for example by `empty_like`.

    Attributes:
        weight_shape: Shape of an adapter's weight.
        codes: The packed codes, uint8, one-dimensional. Each adapter begins with a new byte.
        dtype: Dtype of `weight`, which casts of the module change.
        cache: Dequantized weights of all adapters, of shape `weight_shape` each, or None. If the
            layer's grids are whole numbers times steps, these are the whole numbers, int8.
        keeps: Whether back ends may keep what they have made of the codes.
    """

    formats: LayerFormats | BlockFormats | None = None
    weight_shape: torch.Size
    codes: torch.Tensor
    dtype: torch.dtype
    cache: torch.Tensor | None
    keeps = True
    _kept: dict[Any, Any]
    _kept_of: tuple[Any, ...]

    @abstractmethod
    def decoded_weight(self, adapter: int, dtype: str) -> torch.Tensor:
        """Return an adapter's weight, computed in float32 from its codes and cast to a dtype."""

    @classmethod
    def _with_codes(
        cls, layer: nn.Module, formats: LayerFormats | BlockFormats, adapters: int = 1
    ) -> Self:
        """Return a layer with another's attributes and bias, and with codes of 0."""
        packed = adopt(cls, layer)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        packed.formats, packed.adapters, packed.cache = formats, adapters, None
        packed.forget()
        packed.weight_shape, packed.dtype = weight.shape, weight.dtype
        del packed._parameters["weight"]
        size = adapters * -(-weight.numel() * formats.bits // 8)
        codes = torch.zeros(size, dtype=torch.uint8, device=weight.device)
        # A parameter, not a buffer, because offloading does not move buffers.
        packed.codes = nn.Parameter(codes, requires_grad=False)
        return packed

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight of the first adapter; without formats, the weight parameter."""
        if self.formats is not None:
            return self.quantized_weight().as_subclass(DequantizedWeight)
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError("weight is not set yet")
        return weight

    def quantized_weight(self, adapter: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values of an adapter's codes, computed in float32 and cast to a dtype.

        Args:
            adapter: The adapter of the hub.
            dtype: Any floating-point dtype, or None for that of the module.
        """
        if self.formats is None:
            return self.weight
        dtype = self.dtype if dtype is None else dtype
        # A float32 cache is exact, and can be rounded to any dtype.
        if self.cache is not None and self.cache.dtype in (dtype, torch.float32):
            return self.cache[adapter].to(dtype)
        return self.decoded_weight(adapter, NARROW.get(dtype, "float32")).to(dtype)

    def cache_weight(self, enabled: bool) -> None:
        """Keep the weights in memory as the layer's back end reads them, or delete them."""
        self.cache, self.keeps = None, enabled
        self.forget()
        if enabled and self.formats is not None and not runs_on_integers(self):
            self.cache = torch.stack([self.cached_weight(each) for each in range(self.adapters)])

    def cached_weight(self, adapter: int) -> torch.Tensor:
        """Return an adapter's weight as `cache` has it."""
        return self.quantized_weight(adapter)

    @property
    def needs_gradient(self) -> bool:
        """Whether a parameter of the product needs a gradient: only the bias can."""
        bias: torch.Tensor | None = self._parameters.get("bias")
        return bias is not None and bias.requires_grad

    def kept(self) -> dict[Any, Any]:
        """Return what has been made of the codes and scales, empty if one of them has changed."""
        if self.formats is None:
            return {}
        buffers, of = self._buffers, self._kept_of
        codes, weight_scale = self._parameters["codes"], buffers["weight_scale"]
        scale, zero = buffers.get("input_scale"), buffers.get("input_zero_point")
        # Written out, because every product of every layer passes here.
        if not (
            of
            and of[0] is codes
            and of[1] is weight_scale
            and of[2] is scale
            and of[3] is zero
            and of[4] == _versions(codes, weight_scale, scale, zero)
        ):
            tensors = (codes, weight_scale, scale, zero)
            self._kept, self._kept_of = {}, (*tensors, _versions(*tensors))
        return self._kept

    def forget(self) -> None:
        """Delete what has been made of the codes and scales."""
        self._kept, self._kept_of = {}, ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_kept_of": ()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load the tensors, and dequantize them again for the cache."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.formats is not None:
            self._renew()

    def _renew(self) -> None:
        """Make the cache again, after the tensors have changed."""
        self.forget()
        self._renew_cache()

    def _renew_cache(self) -> None:
        if self.cache is not None:
            self.cache_weight(not self.codes.is_meta)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move and cast the module; casts do not change codes and scales, which are integers.

        A cast to 8 bits, as by layerwise casting, changes nothing: the layer is small already.
        """
        if self.formats is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        fn, device = _but_to_8_bits(fn), self.codes.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        empty = torch.empty(0, dtype=self.dtype, device=self.codes.device)
        self.dtype = fn(empty).dtype
        if self.codes.device != device:
            self.forget()
        # Weights are dequantized again for the cache, because a cast would round them twice.
        self._renew_cache()
        return self

    def extra_repr(self) -> str:
        """Return the description in `repr`."""
        if self.formats is None:
            return super().extra_repr()
        return f"{super().extra_repr()}, {self.formats}"


class ScaledLayer(PackedLayer):
    """A packed layer with a scale for each output channel.

    Attributes:
        weight_scale: Bits of the weight scales, int32, shape (out,).
        input_scale: Bits of the input scale, int32, shape (), or (channels,) with one scale for
            each channel. None if inputs are not quantized.
        input_zero_point: Bits of the input zero point, int32, shape (). None if inputs are not
            quantized or their format is signed.
    """

    formats: LayerFormats | None = None
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None

    @classmethod
    def empty_like(cls, layer: nn.Module, formats: LayerFormats, adapters: int = 1) -> Self:
        """Return a layer with another's attributes and bias, and with codes and scales of 0.

        If the formats have several low-rank branches, these are the adapters of the single weight.
        """
        several = formats.branch_adapters > 1
        packed = cls._with_codes(layer, formats, 1 if several else adapters)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        inputs = formats.input
        by_channel = formats.input_granularity == CHANNEL
        channels = weight.shape[1] * groups_of(layer)
        for name, shape, needed in (
            ("weight_scale", (len(weight),), True),
            ("input_scale", (channels,) if by_channel else (), inputs is not None),
            ("input_zero_point", (), inputs is not None and not inputs.signed),
        ):
            bits = torch.zeros(shape, dtype=torch.int32, device=weight.device)
            packed.register_buffer(name, bits if needed else None)
        rank, columns = formats.branch_rank, weight[0].numel()
        for name, rows, width in (
            ("branch_down", rank, columns),
            ("branch_up", len(weight), rank),
        ):
            shape = (*((formats.branch_adapters,) if several else ()), rows, width)
            factor = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            # If a gradient is required, products may differ in the last bit.
            fixed = nn.Parameter(factor, requires_grad=False)
            packed.register_parameter(name, fixed if rank else None)
        return packed

    @classmethod
    @torch.no_grad()
    def of_weights(
        cls,
        layer: nn.Module,
        weights: Sequence[torch.Tensor],
        weight_quantizer: Quantizer,
        input_quantizer: Quantizer | None,
    ) -> Self:
        """Return a layer with another's attributes and bias, and with packed weights.

        Args:
            layer: The other layer, plain or trainable.
            weights: One weight for each adapter of a hub.
            weight_quantizer: Quantizer of the weights.
            input_quantizer: Quantizer of the inputs, or None to leave them unquantized.
        """
        inputs, fmt = input_quantizer, weight_quantizer.format
        down, up = (layer._parameters.get(name) for name in ("branch_down", "branch_up"))
        formats = LayerFormats.of(weight_quantizer, inputs, up)
        packed = cls.empty_like(layer, formats, len(weights))
        packed.branch_down, packed.branch_up = down, up
        codes = [encode_scaled(w, fmt, weight_quantizer.scale, packed=True) for w in weights]
        packed.codes = nn.Parameter(torch.cat(codes), requires_grad=False)
        packed.weight_scale = to_bits(weight_quantizer.scale).reshape(len(weights[0]))
        if inputs is not None:
            channel = formats.input_granularity == CHANNEL
            packed.input_scale = to_bits(inputs.scale.flatten() if channel else inputs.scale)
            packed.input_zero_point = None if inputs.shift is None else to_bits(inputs.shift)
        return packed

    @property
    def integer_grids(self) -> IntegerGrids | str:
        """The operands as whole numbers times steps, or the reason why they are not."""
        if self.formats is None:
            return "it has no formats yet"
        found: IntegerGrids | str = _grids_of(self)
        return found

    def find_grids(self) -> IntegerGrids | str:
        """Return what `integer_grids` is, from the tensors of the layer."""
        formats, scale, bits = self.formats, self.input_scale, self.input_zero_point
        if formats is None:
            raise ValueError("the layer has no formats yet")
        whole = True
        if formats.input is not None and scale is not None and bits is not None:
            whole = whole_steps(formats.input, from_bits(scale), from_bits(bits)) is not None
        groups = groups_of(self)
        return integer_grids(
            formats.weight,
            formats.input,
            None if scale is None else from_bits(scale),
            whole=whole,
            terms=self.weight_shape[1:].numel(),
            channels=self.weight_shape[1] * groups,
            groups=groups,
        )

    @property
    def weight_step(self) -> torch.Tensor:
        """Weight scales times the step of their format, float32, shape (rows,)."""
        if self.formats is None:
            raise ValueError("the layer has no formats yet")
        return from_bits(self.weight_scale) * self.formats.weight.step

    @property
    def input_shift(self) -> torch.Tensor | None:
        """The zero point of the inputs, float32, shape (), or None."""
        return None if self.input_zero_point is None else from_bits(self.input_zero_point)

    def input_step(self, part: int) -> torch.Tensor:
        """Return an input scale times the step of its format, float32, shape ()."""
        if self.formats is None or self.formats.input is None or self.input_scale is None:
            raise ValueError("the inputs of the layer are not quantized")
        scale = from_bits(self.input_scale)
        scale = scale.unique_consecutive()[part] if scale.dim() else scale
        return scale * self.formats.input.step

    def input_steps(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded to whole numbers of steps, float32, zero being 0."""
        if self.formats is None or self.formats.input is None or self.input_scale is None:
            raise ValueError("the inputs of the layer are not quantized")
        step = self._spread_input_scale() * self.formats.input.step
        return to_whole(self.quantize_input(x.float()) / step)

    def weight_steps(self, adapter: int) -> torch.Tensor:
        """Return the weight for an adapter as whole numbers of steps, float32."""
        if self.cache is not None and self.cache.dtype == torch.int8:
            return self.cache[adapter].float()
        if self.formats is None:
            raise ValueError("the layer has no formats yet")
        steps: torch.Tensor = decode_scaled(
            self.codes.view(self.adapters, -1)[adapter],
            self.formats.weight,
            1 / self.formats.weight.step,  # a power of two, so that the products are exact
            shape=tuple(self.weight_shape),
        )
        return steps

    def cached_weight(self, adapter: int) -> torch.Tensor:
        """Return an adapter's weight as `cache` has it."""
        if isinstance(self.integer_grids, IntegerGrids):
            return self.weight_steps(adapter).to(torch.int8)
        return self.quantized_weight(adapter)

    def _spread_input_scale(self) -> torch.Tensor:
        """Return the input scale in a shape that broadcasts with an input."""
        scale = from_bits(self.input_scale)  # type: ignore[arg-type]
        return scale.view(-1, *(1,) * (len(self.weight_shape) - 2)) if scale.dim() else scale

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded, same shape and dtype; narrow dtypes are computed in float32."""
        if self.formats is None or self.formats.input is None or self.input_scale is None:
            return x
        zero = None if self.input_zero_point is None else from_bits(self.input_zero_point)
        rounded: torch.Tensor = quantize_scaled(
            x, self.formats.input, self._spread_input_scale(), zero, clip_gradient=True
        )
        return rounded

    def decoded_weight(self, adapter: int, dtype: str) -> torch.Tensor:
        """Return `scale * value` of an adapter's codes, computed in float32 and cast to a dtype."""
        if self.formats is None:
            raise ValueError("the layer has no formats yet")
        weight: torch.Tensor = decode_scaled(
            self.codes.view(self.adapters, -1)[adapter],
            self.formats.weight,
            from_bits(self.weight_scale).view(-1, *(1,) * (len(self.weight_shape) - 1)),
            dtype=dtype,
            shape=tuple(self.weight_shape),
        )
        return weight

    def quantizers(self) -> tuple[Quantizer, Quantizer | None]:
        """Return the quantizers of the weight and of the input, rebuilt from formats and scales.

        Raises:
            ValueError: If the layer has no formats yet.
        """
        if self.formats is None:
            raise ValueError("the layer has no formats yet")
        trailing = (1,) * (len(self.weight_shape) - 1)
        scale = from_bits(self.weight_scale).clone().view(-1, *trailing)
        weights = Quantizer(self.formats.weight, scale)
        if self.formats.input is None or self.input_scale is None:
            return weights, None
        scale = from_bits(self.input_scale).clone()
        scale = scale.view(-1, *trailing[1:]) if scale.dim() else scale
        bits = self.input_zero_point
        zero = None if bits is None else from_bits(bits).clone()
        return weights, Quantizer(self.formats.input, scale, zero)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _grids_of(layer: ScaledLayer) -> IntegerGrids | str:
    """Return the integer grids of a layer with formats; they depend on its tensors."""
    kept = layer.kept()
    if GRIDS not in kept:
        kept[GRIDS] = layer.find_grids()
    found: IntegerGrids | str = kept[GRIDS]
    return found


def _versions(*tensors: torch.Tensor | None) -> int:
    """Return a number that changes when one of some tensors is changed in place."""
    try:
        return sum([each._version for each in tensors if each is not None])
    except RuntimeError:  # inference tensors have no version
        return sum(
            [each._version for each in tensors if each is not None and not each.is_inference()]
        )


def _but_to_8_bits(
    fn: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that moves and casts tensors, except that it casts none to 8 bits."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        narrow = moved.dtype != tensor.dtype and moved.dtype.itemsize == 1
        return tensor.to(moved.device) if narrow else moved

    return apply


def adopt(cls: type[Layer], layer: nn.Module) -> Layer:
    """Return a layer of class `cls` with the attributes, hooks and parameters of a layer.

    Dictionaries and sets are copied, so a later change to one layer does not affect the other.
    Submodules and buffers are not adopted.
    """
    adopted = cls.__new__(cls)
    for name, value in vars(layer).items():
        if name in ("_kept", "_kept_of"):
            continue
        adopted.__dict__[name] = copy.copy(value) if isinstance(value, dict | set) else value
    adopted._modules, adopted._buffers = {}, {}
    return adopted


def dequantized(layer: PackedLayer) -> nn.Module:
    """Return a packed layer as a plain layer: first adapter, low-rank branch merged."""
    plain = adopt(plain_class(type(layer)), layer)
    for name in ("formats", "adapters", "weight_shape", "dtype", "cache", "keeps"):
        plain.__dict__.pop(name, None)
    weight = layer.quantized_weight()
    if layer.branch_down is not None and layer.branch_up is not None:
        weight = weight + (layer.branch_up @ layer.branch_down).view_as(weight)
    plain._parameters.clear()
    plain.weight = nn.Parameter(weight)
    plain.register_parameter("bias", layer.bias)
    return plain


def to_bits(number: torch.Tensor) -> torch.Tensor:
    """Return a copy of float32 numbers, with their bits as int32."""
    return number.detach().float().contiguous().clone().view(torch.int32)


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    """Return int32 numbers reinterpreted as float32, in the same memory."""
    return bits.view(torch.float32)


def packed_layers(denoiser: nn.Module) -> dict[str, PackedLayer]:
    """Return the packed layers of a denoiser by name, in definition order."""
    layers = quantized_layers(denoiser)
    return {name: layer for name, layer in layers.items() if isinstance(layer, PackedLayer)}


def cache_weights(model: DiffusionPipeline | nn.Module, *, enabled: bool = True) -> None:
    """Keep dequantized weights in memory for speed, in place, or dequantize at each forward.

    Outputs are the same bits either way. Checkpoints do not include the cached weights.

    Args:
        model: A pipeline or its denoiser, with packed layers.
        enabled: Whether to keep the dequantized weights.

    Raises:
        InputError: If the model is a pipeline without a denoiser.

    Example:
        >>> import msfp
        >>> network = nn.Sequential(nn.Linear(64, 64))
        >>> config = msfp.QuantizationConfig(activation_bits=None, end_bits=4)
        >>> layers = msfp.quantize(network, config)
        >>> _ = msfp.pack(network)
        >>> cache_weights(network)
    """
    check_truth("enabled", enabled)
    denoisers_of(model)
    for network in networks_of(model).values():
        for layer in packed_layers(network).values():
            layer.cache_weight(enabled)


def add_router(denoiser: nn.Module, router: Router) -> None:
    """Add a router to a denoiser, in place, and number its quantized layers in the routing."""
    routing = attach_router(denoiser, router)
    for index, layer in enumerate(quantized_layers(denoiser).values()):
        layer.routing, layer.index = routing, index
