"""Packed layers with one scale for each output channel.

Scales are stored as the bits of float32 numbers in int32 tensors. Neither `model.half()` nor a
loader's cast can then round them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import nn

from fpformats import decode_scaled, encode_scaled, quantize_scaled
from msfp.layers.branch_factor import BranchFactor
from msfp.layers.execution.grids import (
    IntegerGrids,
    integer_grids,
    to_whole,
    token_sizes,
    whole_steps,
)
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.formats import CHANNEL, TOKEN, LayerFormats
from msfp.layers.kinds import groups_of
from msfp.layers.packed import PackedLayer, add_empty_branch, from_bits, to_bits, versions

GRIDS = "grids"
"""Key of the integer grids in what a layer keeps."""


class ScaledLayer(PackedLayer):
    """A packed layer with a scale for each output channel.

    Attributes:
        weight_scale: Bits of the weight scales, int32, shape (out,).
        input_scale: Bits of the input scale, int32, shape (), or (channels,) with one scale for
            each channel. With one for each token it is in units of the token's largest magnitude,
            and so is the zero point. None if inputs are not quantized.
        input_zero_point: Bits of the input zero point, int32, shape (). None if inputs are not
            quantized or their format is signed.
        branch_input_scale: Bits of the scale of the input of a low-rank branch in 8 bits, int32,
            shape (). None without such a branch.
        branch_input_zero_point: Bits of its zero point, int32, shape (), or None.
    """

    formats: LayerFormats | None = None
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    branch_input_scale: torch.Tensor | None
    branch_input_zero_point: torch.Tensor | None

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
            ("branch_input_scale", (), formats.branch_input is not None),
            ("branch_input_zero_point", (), formats.branch_input is not None),
        ):
            bits = torch.zeros(shape, dtype=torch.int32, device=weight.device)
            packed.register_buffer(name, bits if needed else None)
        add_empty_branch(packed, formats.branch_rank, formats.branch_adapters)
        return packed

    @classmethod
    @torch.no_grad()
    def of_weights(
        cls,
        layer: nn.Module,
        weights: Sequence[torch.Tensor],
        weight_quantizer: Quantizer,
        input_quantizer: Quantizer | None,
        branch_input: Quantizer | None = None,
    ) -> Self:
        """Return a layer with another's attributes and bias, and with packed weights.

        Args:
            layer: The other layer, plain or trainable.
            weights: One weight for each adapter of a hub.
            weight_quantizer: Quantizer of the weights.
            input_quantizer: Quantizer of the inputs, or None to leave them unquantized.
            branch_input: Quantizer of the input of the low-rank branch, or None for a branch in
                full precision.
        """
        inputs, fmt = input_quantizer, weight_quantizer.format
        down, up = (layer._parameters.get(name) for name in ("branch_down", "branch_up"))
        rotation: int = getattr(layer, "rotation", 1)  # a plain layer has none
        formats = LayerFormats.of(weight_quantizer, inputs, up, branch_input, rotation)
        packed = cls.empty_like(layer, formats, len(weights))
        packed.branch_down, packed.branch_up = down, up
        codes = [encode_scaled(w, fmt, weight_quantizer.scale, packed=True) for w in weights]
        packed.codes = nn.Parameter(torch.cat(codes), requires_grad=False)
        packed.weight_scale = to_bits(weight_quantizer.scale).reshape(len(weights[0]))
        if inputs is not None:
            channel = formats.input_granularity == CHANNEL
            packed.input_scale = to_bits(inputs.scale.flatten() if channel else inputs.scale)
            packed.input_zero_point = None if inputs.shift is None else to_bits(inputs.shift)
        if branch_input is not None and branch_input.shift is not None:
            packed.branch_input_scale = to_bits(branch_input.scale)
            packed.branch_input_zero_point = to_bits(branch_input.shift)
        return packed

    def remove_branch(self) -> None:
        """Remove the low-rank branch, if there is one."""
        if self.formats is None:
            return
        self.formats = replace(self.formats, branch_rank=0, branch_adapters=1, branch_input=None)
        self.branch_down = self.branch_up = None
        self.branch_input_scale = self.branch_input_zero_point = None

    def branch_quantizer(self) -> Quantizer | None:
        """Return the quantizer of the input of a low-rank branch in 8 bits, or None."""
        scale, zero = self.branch_input_scale, self.branch_input_zero_point
        if self.formats is None or self.formats.branch_input is None or scale is None:
            return None
        shift = None if zero is None else from_bits(zero).clone()
        return Quantizer(self.formats.branch_input, from_bits(scale).clone(), shift)

    def branch_factor(self, down: torch.Tensor, adapter: int) -> BranchFactor | None:
        """Return the first factor of a low-rank branch in 8 bits; None in full precision."""
        if self.formats is None or self.formats.branch_input is None:
            return None
        if not self.keeps:
            return self.make_branch_factor(down)
        _keep_branch_factor(self, adapter)
        found: BranchFactor = self._factors[adapter]
        return found

    def make_branch_factor(self, down: torch.Tensor) -> BranchFactor:
        """Return a factor (rank, columns) of a low-rank branch in 8 bits."""
        inputs = self.branch_quantizer()
        if inputs is None:
            raise ValueError("the branch of the layer is in full precision")
        return BranchFactor(self, self.kind, down, inputs, keeps=self.keeps)

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
        by_token = formats.input_granularity == TOKEN
        return integer_grids(
            formats.weight,
            formats.input,
            None if scale is None else from_bits(scale),
            whole=whole,
            terms=self.weight_shape[1:].numel(),
            channels=self.weight_shape[1] * groups,
            groups=groups,
            by_token=by_token,
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
        step = step * token_sizes(x) if self.by_token else step
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

    @property
    def by_token(self) -> bool:
        """Whether each token of the input has a scale."""
        return self.formats is not None and self.formats.input_granularity == TOKEN

    def _spread_input_scale(self) -> torch.Tensor:
        """Return the input scale in a shape that broadcasts with an input."""
        scale = from_bits(self.input_scale)  # type: ignore[arg-type]
        return scale.view(-1, *(1,) * (len(self.weight_shape) - 2)) if scale.dim() else scale

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input rounded, same shape and dtype; narrow dtypes are computed in float32."""
        if self.formats is None or self.formats.input is None or self.input_scale is None:
            return x
        scale, zero = self._spread_input_scale(), self.input_shift
        if self.by_token:
            sizes = token_sizes(x)
            scale, zero = scale * sizes, None if zero is None else zero * sizes
        rounded: torch.Tensor = quantize_scaled(
            x, self.formats.input, scale, zero, clip_gradient=True
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
        return weights, Quantizer(self.formats.input, scale, zero, by_token=self.by_token)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _keep_branch_factor(layer: ScaledLayer, adapter: int) -> bool:
    """Keep a factor of a branch in 8 bits in `layer._factors`, unless it is there and the same."""
    down, of = layer._parameters["branch_down"], layer._factors_of
    scale, zero = (layer._buffers[f"branch_input_{each}"] for each in ("scale", "zero_point"))
    version = versions(down, scale, zero)
    # Written out, because every product of every branch passes here.
    if not (of and of[0] is down and of[1] is scale and of[2] is zero and of[3] == version):
        layer._factors, layer._factors_of = {}, (down, scale, zero, version)
    if adapter not in layer._factors and down is not None:
        own = down if down.dim() == 2 else down[adapter]
        layer._factors[adapter] = layer.make_branch_factor(own)
    return True


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _grids_of(layer: ScaledLayer) -> IntegerGrids | str:
    """Return the integer grids of a layer with formats; they depend on its tensors."""
    kept = layer.kept()
    if GRIDS not in kept:
        kept[GRIDS] = layer.find_grids()
    found: IntegerGrids | str = kept[GRIDS]
    return found
