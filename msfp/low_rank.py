"""Low-rank parts of weights: the best one in the layer's output, and branches that carry one."""

from __future__ import annotations

import torch
from torch import nn

from fpformats.search import search
from msfp.config import MAX_BITS, MAX_RANK, check_range
from msfp.errors import InputError
from msfp.open_layers import OpenLayer, untrained_layers
from msfp.post_training import WEIGHT_RATIOS, float_formats
from msfp.quantizer import Quantizer


def low_rank(
    error: torch.Tensor, second: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of the low-rank matrix that takes most of an error's output away.

    With `second = S S^T` it is the truncated SVD of `error @ S`, divided by S again: the minimiser
    of E|(error - up down) x|^2 over all matrices of that rank (Eckart and Young, 1936). With the
    identity for `second` it is the plain SVD of the error.

    Args:
        error: What quantization takes from a weight, or the weight itself, shape (rows, columns).
        second: Second moments of the columns, positive definite, shape (columns, columns).
        rank: At most this; fewer where the matrix is smaller.

    Returns:
        `down` of shape (rank, columns) and `up` of shape (rows, rank).

    Raises:
        torch.linalg.LinAlgError: If the moments are not positive definite.

    Example:
        >>> error = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        >>> down, up = low_rank(error, torch.eye(2), rank=1)
        >>> torch.allclose(up @ down, error)
        True
    """
    root = torch.linalg.cholesky(second)
    left, values, right = torch.linalg.svd(error @ root, full_matrices=False)
    up = left[:, :rank] * values[:rank].sqrt()
    down = values[:rank, None].sqrt() * right[:rank]
    return torch.linalg.solve_triangular(root, down, upper=False, left=False), up


@torch.no_grad()
def add_branches(denoiser: nn.Module, rank: int) -> list[str]:
    """Take the largest singular values out of weights, into branches of full precision.

    What is left has fewer outliers and less to multiply errors of the input with (SVDQuant, Li et
    al., ICLR 2025); its format and scales are searched anew. In full precision the denoiser
    computes the same as before.

    Args:
        denoiser: Quantized by `quantize`, open and without branches; changed in place.
        rank: Of each branch. A layer gets none where it would have as many weights as the layer,
            or where the layer has 8 bits.

    Returns:
        The names of the layers that got a branch.

    Raises:
        InputError: If the denoiser has no quantized layer, one that is sealed or has LoRAs, or
            branches already, or the rank is below 1.
    """
    check_range("rank", rank, 1, MAX_RANK)
    layers = untrained_layers(denoiser)
    if any(layer.branch_up is not None for layer in layers.values()):
        raise InputError("the denoiser has branches already")
    names = []
    for name, layer in layers.items():
        rows, columns = layer.weight.flatten(1).shape
        narrow = layer.weight_quantizer.format.bits < MAX_BITS
        if narrow and rank * (rows + columns) < rows * columns:
            _add_branch(layer, rank)
            names.append(name)
    return names


def _add_branch(layer: OpenLayer, rank: int) -> None:
    """Take the largest singular values out of a layer's weight."""
    dtype = layer.weight.dtype
    matrix = layer.weight.float().flatten(1)
    factors = low_rank(matrix, torch.eye(matrix.shape[1], device=matrix.device), rank)
    # Of 16 bits, as they are stored; in memory as a loader lays them out, since products may depend
    # on strides in the last bit.
    halves = (factor.half() for factor in factors)
    down, up = (torch.empty(f.shape, dtype=dtype, device=f.device).copy_(f) for f in halves)
    layer.branch_down, layer.branch_up = (nn.Parameter(f, requires_grad=False) for f in (down, up))
    rest = (matrix - up.float() @ down.float()).view_as(layer.weight)
    layer.weight = nn.Parameter(rest.to(dtype), requires_grad=False)
    layer.weight_quantizer = _searched(rest, layer.weight_quantizer)


def _searched(weight: torch.Tensor, old: Quantizer) -> Quantizer:
    """Return the quantizer of a weight, of the kind, width and granularity of another."""
    floats = old.format.exponent_bits > 0  # integers have no exponent
    formats = float_formats(old.format.bits, signed=True) if floats else [old.format]
    axis = 0 if len(old.scale.unique()) > 1 else None
    choice = search(weight, formats, ratios=WEIGHT_RATIOS, axis=axis)
    scale = torch.as_tensor(choice.scale, dtype=torch.float32, device=weight.device)
    return Quantizer(choice.format, scale.expand(old.scale.shape))
