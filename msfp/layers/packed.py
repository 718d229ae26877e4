"""Packed linear and convolution layers, with packed weights and quantized inputs.

A quantized layer (`msfp.layers.base`) is trainable or packed. A trainable layer
(`msfp.layers.trainable`) has the full-precision weight and can be trained. A packed layer has only
packed codes and scales. Only packed layers are saved. `msfp.layers.scaled` has those with one scale
for each output channel, `msfp.layers.block` those with one scale for each block.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.layers.base import QuantizedLayer, quantized_layers
from msfp.layers.branch_factor import BranchFactor
from msfp.layers.dequantized_weight import DequantizedWeight
from msfp.layers.execution.backends import runs_on_integers
from msfp.layers.formats import BlockFormats, LayerFormats
from msfp.layers.kinds import plain_class
from msfp.layers.lora.routers import Router
from msfp.layers.lora.talora import attach_router
from msfp.pipelines.denoiser import denoisers_of, networks_of
from msfp.support.checks import check_truth

Layer = TypeVar("Layer", bound=nn.Module)
NARROW = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


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
    _factors: dict[int, BranchFactor]
    _factors_of: tuple[Any, ...]

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
        packed.rotation = formats.rotation
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
        """The dequantized weight of the first adapter; without formats, the weight parameter.

        It is that of the inputs, also where these are rotated.
        """
        if self.formats is not None:
            values = self.unrotated_weight(self.quantized_weight())
            return values.as_subclass(DequantizedWeight)
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
            and of[4] == versions(codes, weight_scale, scale, zero)
        ):
            tensors = (codes, weight_scale, scale, zero)
            self._kept, self._kept_of = {}, (*tensors, versions(*tensors))
        return self._kept

    def forget(self) -> None:
        """Delete what has been made of the codes and scales."""
        vars(self).update(_nothing_kept())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **_nothing_kept()}

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
        self._factors, self._factors_of = {}, ()  # a cast rounds branches
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


def _nothing_kept() -> dict[str, Any]:
    """Return the attributes with what has been made of a layer's tensors, when there is nothing."""
    return {"_kept": {}, "_kept_of": (), "_factors": {}, "_factors_of": ()}


def add_empty_branch(packed: PackedLayer, rank: int, adapters: int = 1) -> None:
    """Give a packed layer factors of a low-rank branch, or of several, with numbers of 0.

    Args:
        packed: The layer, in place.
        rank: Rank of the branch; 0 for no branch.
        adapters: Number of branches.
    """
    rows, columns = packed.weight_shape[0], packed.weight_shape[1:].numel()
    for name, *shape in (("branch_down", rank, columns), ("branch_up", rows, rank)):
        several = (adapters,) if adapters > 1 else ()
        factor = torch.zeros(*several, *shape, dtype=packed.dtype, device=packed.codes.device)
        # If a gradient is required, products may differ in the last bit.
        fixed = nn.Parameter(factor, requires_grad=False)
        packed.register_parameter(name, fixed if rank else None)


def versions(*tensors: torch.Tensor | None) -> int:
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
        own_forward = name == "forward" and getattr(value, "__func__", None) is type(layer).forward
        if name in _nothing_kept() or own_forward:  # as removed hooks leave it
            continue
        adopted.__dict__[name] = copy.copy(value) if isinstance(value, dict | set) else value
    adopted._modules, adopted._buffers = {}, {}
    return adopted


def dequantized(layer: PackedLayer) -> nn.Module:
    """Return a packed layer as a plain layer: first adapter, low-rank branch merged."""
    plain = adopt(plain_class(type(layer)), layer)
    for name in ("formats", "adapters", "weight_shape", "dtype", "cache", "keeps", "rotation"):
        plain.__dict__.pop(name, None)
    weight = layer.unrotated_weight(layer.quantized_weight())
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
