"""Quantized products of attention: queries with keys, and softmax probabilities with values.

The linear layers of attention are quantized like all others. This module quantizes the two matrix
products between them. Probabilities lie in [0, 1], so their format is unsigned, without a zero
point. Attention processors are not changed: while an attention module runs, calls of scaled
dot-product attention are computed on rounded operands, whatever else its processor does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fpformats import FloatFormat, parse
from msfp.errors import InputError
from msfp.layers.fake_quantizer import Quantizer

OPERANDS = ("query", "key", "probabilities", "value")

RoundOperand = Callable[[str, torch.Tensor], torch.Tensor]
"""A function that rounds an operand, given its name."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    round_operand: RoundOperand,
) -> torch.Tensor:
    """Return softmax(Q K^T scale + mask) V, with the operands of both products rounded.

    Args:
        query: Shape (..., queries, width).
        key: Shape (..., keys, width).
        value: Shape (..., keys, values).
        mask: Added to the scores; or boolean, where False excludes a key; or None.
        scale: Scale of the scores. None is width ** -0.5.
        round_operand: Function that rounds each operand, given a name of `OPERANDS` and a tensor.

    Returns:
        Shape (..., queries, values).
    """
    scores = round_operand("query", query) @ round_operand("key", key).mT
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(mask.logical_not(), -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return round_operand("probabilities", scores.softmax(dim=-1)) @ round_operand("value", value)


class _Products(TorchFunctionMode):
    """Computes scaled dot-product attention on rounded operands inside the block.

    Attributes:
        projected: Whether a linear layer was applied in the block.
        attended: Whether scaled dot-product attention was computed in the block.
    """

    def __init__(self, round_operand: RoundOperand) -> None:
        super().__init__()
        self.round_operand = round_operand
        self.projected = self.attended = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace scaled dot-product attention, and call all other functions unchanged."""
        if func is not F.scaled_dot_product_attention:
            self.projected = self.projected or func is F.linear
            return func(*args, **(kwargs or {}))
        self.attended = True
        return self._attention(*args, **(kwargs or {}))

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if dropout_p or is_causal or enable_gqa:
            raise InputError("attention must be without dropout, causal mask and grouped queries")
        return attention(query, key, value, attn_mask, scale, self.round_operand)


class Switch:
    """Turns rounding on while one attention module runs, by hooks around its forward."""

    def __init__(self, module: nn.Module, round_operand: RoundOperand) -> None:
        self.mode = _Products(round_operand)
        self.handles = (
            module.register_forward_pre_hook(self.enter),
            module.register_forward_hook(self.leave, always_call=True),
        )

    def enter(self, *_: Any) -> None:
        """Start rounding."""
        self.mode.projected = self.mode.attended = False
        self.mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Stop rounding; raise InputError if attention was computed in another way.

        A cache may leave attention out altogether, which is no error.
        """
        self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is not None and self.mode.projected and not self.mode.attended:
            raise InputError(
                f"{type(module.processor).__name__} does not call scaled dot-product attention, "
                "which quantized products need: set another processor, or attention backend"
            )

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


class AttentionProducts(nn.ModuleDict):
    """The quantizers of one attention module, one for each of `OPERANDS`."""

    switch: Switch
    quantizing: bool = True

    def round_operand(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return an operand rounded, or unchanged if `quantizing` is False."""
        if not self.quantizing:
            return x
        rounded: torch.Tensor = self[name](x)
        return rounded

    def attach(self, module: nn.Module) -> None:
        """Add the quantizers to an attention module, in place, and round its operands."""
        module.add_module("products", self)
        self.switch = Switch(module, self.round_operand)


def attention_products(denoiser: nn.Module) -> dict[str, AttentionProducts]:
    """Return the quantizers of attention products by the name of their attention module."""
    return {
        name.removesuffix(".products"): module
        for name, module in denoiser.named_modules()
        if isinstance(module, AttentionProducts)
    }


def remove_products(denoiser: nn.Module) -> None:
    """Remove the quantizers of attention products from a denoiser, in place."""
    for name, products in attention_products(denoiser).items():
        products.switch.remove()
        del denoiser.get_submodule(name).products


def product_formats(denoiser: nn.Module) -> dict[str, dict[str, str]]:
    """Return the formats of the operands of each attention module, by name."""
    return {
        name: {operand: str(products[operand].format) for operand in OPERANDS}
        for name, products in attention_products(denoiser).items()
    }


def make_room_for_products(denoiser: nn.Module, formats: dict[str, dict[str, str]]) -> None:
    """Add empty quantizers for a checkpoint's tensors of attention products, in place.

    Args:
        denoiser: The plain network, on any device.
        formats: Formats that `product_formats` returned.

    Raises:
        InputError: If the denoiser has no attention module with one of the names.
    """
    modules = attention_modules(denoiser)
    device = next(denoiser.parameters()).device
    for name, named in formats.items():
        if name not in modules:
            raise InputError(
                f"the checkpoint has an attention module {name!r}, but "
                f"{type(denoiser).__name__} has none of this name"
            )
        quantizers = {}
        for operand in OPERANDS:
            fmt = parse(named[operand])
            zero, scale = (torch.zeros((), device=device) for _ in range(2))
            quantizers[operand] = Quantizer(
                fmt, scale, zero if has_zero_point(operand, fmt) else None
            )
        AttentionProducts(quantizers).attach(modules[name])


def has_zero_point(operand: str, fmt: FloatFormat) -> bool:
    """Return whether an operand has a zero point: unsigned formats do, except for probabilities."""
    return not fmt.signed and operand != "probabilities"


def attention_modules(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of a denoiser by name: the modules with `set_processor`."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if hasattr(module, "processor") and hasattr(module, "set_processor")
    }
