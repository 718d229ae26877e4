"""Gradients of rounding: what training sees in place of a derivative that is zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpformats.operands import learns

if TYPE_CHECKING:
    from collections.abc import Callable


class _Surrogate(torch.autograd.Function):
    """A rounded result, with given partial derivatives for the inputs that it came from."""

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
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        del output
        _, x, scale, zero_point, passes, slope, clamped = inputs
        ctx.save_for_backward(passes, slope, clamped)
        ctx.like = [t if t is None else (t.shape, t.dtype) for t in (x, scale, zero_point)]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        passes, slope, clamped = ctx.saved_tensors
        like_x, like_scale, like_zero = ctx.like
        _, needs_x, needs_scale, needs_zero, *_ = ctx.needs_input_grad
        return (
            None,
            _reduced(grad if passes is None else grad * passes, like_x) if needs_x else None,
            _reduced(grad * slope, like_scale) if needs_scale else None,
            _reduced(grad * clamped, like_zero) if needs_zero else None,
            None,
            None,
            None,
        )


_apply: Callable[..., Tensor] = _Surrogate.apply


def straight_through(result: Tensor, x: Tensor, passes: Tensor | None) -> Tensor:
    """Attach the straight-through gradient to a result of rounding `x`.

    Args:
        result: Rounded values.
        x: What was rounded, of the same shape.
        passes: Where the gradient passes to `x`; None for everywhere.

    Returns:
        The values of `result`, differentiable towards `x`.
    """
    return _apply(result, x, None, None, passes, None, None)


def learned_step(
    result: Tensor,
    inputs: tuple[Tensor, Any, Any],
    v: Tensor,
    q: Tensor,
    inside: Tensor,
    clip_gradient: bool,
) -> Tensor:
    """Attach the gradients of learned step sizes to a result s * q + z.

    Args:
        result: The scaled result.
        inputs: What was rounded, the scale and the zero point, of which those that are tensors
            and require a gradient get one.
        v: The scaled input, (x - z) / s.
        q: `v`, rounded.
        inside: Where `v` is in the range of the format.
        clip_gradient: Whether the gradient of x is zero elsewhere.

    Returns:
        The values of `result`, differentiable towards the inputs.
    """
    x, scale, zero_point = (t if isinstance(t, Tensor) else None for t in inputs)
    return _apply(
        result,
        x,
        scale,
        zero_point,
        inside if clip_gradient else None,
        torch.where(inside, q - v, q) if learns(scale) else None,
        ~inside if learns(zero_point) else None,
    )


def _reduced(grad: Tensor, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    """Sum a gradient over the dimensions that its input was broadcast along."""
    shape, dtype = like
    return grad.sum_to_size(shape).to(dtype)
