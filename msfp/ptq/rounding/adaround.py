"""Learned rounding: each weight goes up or down on its grid as the layer's output asks.

AdaRound (Nagel et al., ICML 2020) relaxes the choice to a number h in [0, 1] for each weight, the
share of the way from the value below it to the one above, and lets gradient descent find it while
a regulariser drives h to 0 or 1. With second moments at hand the error of the output is a
quadratic form, so no data passes through the layer.
"""

from __future__ import annotations

import torch

from fpformats import FloatFormat, Rounding, quantize_scaled

STRETCH = 0.1
"""The sigmoid reaches this far beyond 0 and 1, so that h attains them (equation 23)."""
SHARPNESS = (20.0, 2.0)
"""First and last exponent of the regulariser: flat in the middle, then steep (equation 24)."""
WARM_UP = 0.2
"""Part of the steps without regulariser."""
STRENGTH = 30.0
"""Weight of the regulariser, in units of the error of rounding each weight by itself."""
RATE = 0.1
"""Rate of Adam for the logits of h."""


def _share(logits: torch.Tensor) -> torch.Tensor:
    """Return h, the stretched and clipped sigmoid."""
    return (logits.sigmoid() * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def _logits(share: torch.Tensor) -> torch.Tensor:
    """Return the logits whose h is given."""
    return ((share + STRETCH) / (1 + 2 * STRETCH)).logit()


def adaround(
    matrix: torch.Tensor,
    second: torch.Tensor,
    fmt: FloatFormat,
    scale: torch.Tensor,
    *,
    steps: int = 300,
) -> torch.Tensor:
    """Round a matrix up or down to the values of a format times a scale, by learned choices.

    Args:
        matrix: The wanted weights, shape (groups, rows, columns).
        second: Second moments of the columns it multiplies, shape (groups, columns, columns).
        fmt: Any format.
        scale: One for each weight; any shape that broadcasts to the matrix's.
        steps: Steps of Adam; each costs as much as a product of matrix and moments.

    Returns:
        The rounded matrix, shape and dtype of `matrix`; each weight is one of its two neighbours.

    Example:
        Both are nearest to one value on the same side, and one goes to the other side:

        >>> from fpformats import E2M1
        >>> matrix, second = torch.tensor([[[1.2, 1.3]]]), torch.ones(1, 2, 2)
        >>> adaround(matrix, second, E2M1, torch.tensor(1.0))
        tensor([[[1.0000, 1.5000]]])
    """
    matrix = matrix.contiguous()
    low = quantize_scaled(matrix, fmt, scale, rounding=Rounding.TowardNegative)
    high = quantize_scaled(matrix, fmt, scale, rounding=Rounding.TowardPositive)
    gap = high - low
    diagonal = second.diagonal(dim1=-2, dim2=-1)[..., None, :]
    # In units of a weight's own error by nearest rounding, so that one strength suits all layers.
    unit = (gap.square() * diagonal).mean().clamp(min=torch.finfo(gap.dtype).tiny) / 12
    share = torch.where(gap > 0, (matrix - low) / gap.clamp(min=torch.finfo(gap.dtype).tiny), 0.5)
    logits = _logits(share).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=RATE)
    for step in range(steps):
        progress = (step / steps - WARM_UP) / (1 - WARM_UP)
        with torch.enable_grad():
            share = _share(logits)
            error = matrix - low - gap * share
            loss = ((error @ second) * error).sum() / unit
            if progress > 0:
                sharpness = SHARPNESS[0] + (SHARPNESS[1] - SHARPNESS[0]) * progress
                loss = loss + STRENGTH * (1 - (2 * share - 1).abs() ** sharpness).sum()
        (logits.grad,) = torch.autograd.grad(loss, [logits])
        optimizer.step()
    return torch.where(_share(logits.detach()) > 0.5, high, low)
