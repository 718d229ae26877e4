"""Corrections in closed form: the weights and bias for what a layer really reads."""

from __future__ import annotations

import torch

from msfp.ptq.moments import Moments


def matched_matrix(
    matrix: torch.Tensor, moments: Moments, upper: torch.Tensor, *, centred: bool
) -> torch.Tensor:
    """Return the matrix that gives the wanted outputs best from the inputs as they are read.

    With moments damped by d it minimises the mean square of `y - M x` plus d times the squared
    distance from the given matrix. Errors of the inputs that show in the inputs themselves are so
    made up for; without any, the matrix is returned.

    Args:
        matrix: The full-precision weights, shape (groups, rows, columns).
        moments: Of the quantized inputs x and the full-precision outputs y.
        upper: The `upper_factor` of the second moments of x, damped.
        centred: Whether a bias makes up for the means (ordinary least squares with intercept).

    Returns:
        Shape (groups, rows, columns).
    """
    second = moments.second(centred=centred)
    residual = moments.cross(centred=centred) - matrix @ second
    half = torch.linalg.solve_triangular(upper.mT, residual, upper=False, left=False)
    change: torch.Tensor = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    return matrix + change


def matched_bias(matrix: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Return the bias with which the mean output is the wanted one, shape (groups * rows,).

    Args:
        matrix: The weights as quantized, shape (groups, rows, columns).
        moments: Of the quantized inputs and the full-precision outputs, bias included.
    """
    mean = (matrix @ moments.input_mean[..., None])[..., 0]
    return (moments.output_mean - mean).flatten()
