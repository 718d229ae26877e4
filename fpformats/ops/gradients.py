"""Gradients of rounding, which training uses in place of the true derivative, zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fpformats.engine import cpu, dispatch
from fpformats.engine.arrays import (
    cast,
    float_dtype_of,
    in_forward_mode,
    is_dual,
    is_plain_tensor,
    learns,
    narrowed,
    quiet,
    widened,
)
from fpformats.engine.scales import repeat

if TYPE_CHECKING:
    from collections.abc import Callable

    from fpformats.engine.scales import Scales
    from fpformats.formats import FloatFormat
    from fpformats.kernels.grid import FloatDtype, Grid
    from fpformats.rounding import Policy

FUSED = (torch.float32, torch.float64)
"""Dtypes for which the compiled kernels compute gradients; they are also the compute dtypes."""
Factors = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Factors of the gradients of the input, the scale and the zero point. None means that a gradient
passes unchanged, or is not wanted."""


class Step(NamedTuple):
    """How a tensor is scaled and rounded.

    Attributes:
        fmt: The format.
        grid: The kernel parameters of the format in `working`.
        working: The compute dtype.
        policy: How to round.
        scales: Scales and zero points.
        clip_gradient: Whether the gradient of the input is zero beyond the range of the format.
    """

    fmt: FloatFormat
    grid: Grid
    working: FloatDtype
    policy: Policy
    scales: Scales
    clip_gradient: bool

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled input v and its rounded value q, in whole-tensor operations."""
        with quiet():
            v = dispatch.unscaled(widened(x, self.working), self.scales)
            return v, dispatch.rounded(v, self.grid, self.policy)

    def factors(self, v: Tensor, q: Tensor, wanted: tuple[bool, bool]) -> Factors:
        """Return the factors of gradients; `wanted` is for those of the scale and zero point."""
        inside = (v >= self.grid.low) & (v <= self.grid.high)
        return (
            inside if self.clip_gradient else None,
            torch.where(inside, q - v, q) if wanted[0] else None,
            ~inside if wanted[1] else None,
        )


class _SelfAdjoint(torch.autograd.Function):
    """A linear map with a symmetric matrix, which is its own derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.map = apply
        return apply(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.map(grads[0]), None


_self_adjoint: Callable[..., Tensor] = _SelfAdjoint.apply


def self_adjoint(x: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a linear map with a symmetric matrix to a tensor, with its gradient."""
    mapped: Tensor = _self_adjoint(x, apply)
    return mapped


class _Surrogate(torch.autograd.Function):
    """A rounded result, with given partial derivatives with respect to its inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        result: Tensor,
        x: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        passes: Tensor | None,
        slope: Tensor | None,
        clamped: Tensor | None,
    ) -> Tensor:
        del x, scale, zero_point, passes, slope, clamped
        return result.detach()  # not a view: views cannot be changed in place here

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        del output
        _, x, scale, zero_point, passes, slope, clamped = inputs
        ctx.save_for_backward(passes, slope, clamped)
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, scale, zero_point)]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        _, *needs = ctx.needs_input_grad[:4]
        return (None, *_multiplied(grad, ctx.saved_tensors, ctx.like, needs), None, None, None)


class _DualSurrogate(_Surrogate):
    """The same with derivatives in forward mode, which torch.compile does not support."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _Surrogate.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[4:])
        ctx.dtype = output.dtype

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        factors = zip(tangents[1:4], ctx.saved_tensors, strict=True)
        parts = [t if factor is None else t * factor for t, factor in factors if t is not None]
        return sum(parts[1:], parts[0]).to(ctx.dtype)


def _apply(*inputs: Tensor | None) -> Tensor:
    """Attach the derivatives that the other inputs give to the first one."""
    surrogate: Any = _DualSurrogate if in_forward_mode() else _Surrogate
    result: Tensor = surrogate.apply(*inputs)
    return result


class _Fused(torch.autograd.Function):
    """A rounded result of the compiled kernels, which round again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        step: Step,
        kernel: Any,
    ) -> Tensor:
        # The scales are copied, because training may change them before the backward pass. If
        # random words or `x` have changed by then, torch raises an error.
        scales = (given if given is None else given.clone() for given in step.scales[:2])
        words = step.policy.random
        ctx.save_for_backward(x, *scales, words if isinstance(words, Tensor) else None)
        ctx.step = step._replace(scales=step.scales._replace(scale=None, zero_point=None))
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, scale, zero_point)]
        result: Tensor = cpu.quantize(kernel, x.detach(), step.policy, step.scales)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, scale, zero_point, _ = ctx.saved_tensors
        step = ctx.step._replace(
            scales=ctx.step.scales._replace(scale=scale, zero_point=zero_point)
        )
        needs = tuple(ctx.needs_input_grad[:3])
        kernel = _kernel_of(x, step) if x.dtype == grad.dtype else None
        # If gradients are enabled here, a gradient of the gradient is wanted.
        if kernel is None or torch.is_grad_enabled() or not is_plain_tensor(grad):
            factors = step.factors(*step.rounded(x), needs[1:])
            return (*_multiplied(grad, factors, ctx.like, needs), None, None)
        gradients = cpu.differentiate(
            kernel, x, grad, step.policy, step.scales, needs, clip_gradient=step.clip_gradient
        )
        reduced = (_reduced(*each) for each in zip(gradients, ctx.like, strict=True))
        return (*reduced, None, None)


_apply_fused: Callable[..., Tensor] = _Fused.apply


def straight_through(result: Tensor, x: Tensor, passes: Tensor | None) -> Tensor:
    """Attach the straight-through gradient to a result of rounding `x`.

    Args:
        result: Rounded values.
        x: The tensor that was rounded, of the same shape.
        passes: Where the gradient passes to `x`; None for everywhere.

    Returns:
        The values of `result`, differentiable with respect to `x`.
    """
    return _apply(result, x, None, None, passes, None, None)


def learned_step(x: Tensor, scale: Any, zero_point: Any, step: Step) -> Tensor:
    """Round to s * q + z, with the gradients of learned step sizes.

    Args:
        x: The tensor to round.
        scale: The scale as the caller gave it; a tensor that requires a gradient gets one.
        zero_point: Likewise, or None.
        step: How to scale and round.

    Returns:
        Rounded values, differentiable with respect to the inputs that require a gradient.
    """
    learned = _repeated(scale, zero_point, x, step.scales)
    if (kernel := _kernel_of(x, step)) is not None:
        return _apply_fused(x, *learned, step, kernel)
    v, q = step.rounded(x)
    with quiet():
        y = narrowed(dispatch.rescaled(q.clone(), step.scales), x)
    wanted = [learns(each) or is_dual(each) for each in learned]
    factors = step.factors(v, q, (wanted[0], wanted[1]))
    return _apply(y, x, *learned, *factors)


def rescaled_step(
    values: Tensor, scale: Any, zero_point: Any, scales: Scales, dtype: FloatDtype
) -> Tensor:
    """Scale and shift values of a format, with the gradients of both.

    Args:
        values: Values of the format, in the compute dtype.
        scale: The scale as the caller gave it.
        zero_point: Likewise, or None.
        scales: Both, checked.
        dtype: Dtype of the result.

    Returns:
        s * q + z, differentiable with respect to s and z if they require a gradient.
    """
    with quiet():
        y = cast(dispatch.rescaled(values.clone(), scales), dtype.name)
    learned = _repeated(scale, zero_point, values, scales)
    return _apply(y, values, *learned, None, values, None)


def _repeated(scale: Any, zero_point: Any, x: Tensor, scales: Scales) -> list[Tensor | None]:
    """Repeat the scale and the zero point for the elements of their blocks; None if no tensor."""
    return [
        repeat(each, tuple(x.shape), scales.block_size) if isinstance(each, Tensor) else None
        for each in (scale, zero_point)
    ]


def _kernel_of(x: Tensor, step: Step) -> Any:
    """Return the compiled kernel that rounds a tensor and gives its gradients, or None."""
    if x.dtype not in FUSED or torch._C._are_functorch_transforms_active() or in_forward_mode():
        return None
    return cpu.kernel_of(x, step.fmt, float_dtype_of(x), step.policy, step.scales)


def _multiplied(grad: Tensor, factors: Any, likes: Any, needs: Any) -> list[Tensor | None]:
    """Return the gradients of the inputs that need one."""
    return [
        _reduced(grad if factor is None else grad * factor, like) if need else None
        for factor, like, need in zip(factors, likes, needs, strict=True)
    ]


def _reduced(grad: Any, like: Any) -> Any:
    """Sum a gradient over the dimensions that its input was broadcast along."""
    if grad is None:
        return None
    shape, dtype = like
    summed = grad if grad.shape == shape else grad.sum_to_size(shape)  # this is slow
    return summed.to(dtype)
