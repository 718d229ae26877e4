"""Low-rank parts of weights: the best one in the layer's output, and branches that carry one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fpformats.search import search_rows
from msfp.config import MAX_RANK, check_range
from msfp.denoiser import position
from msfp.errors import InputError
from msfp.layers import QuantizedLayer, quantized_layers
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


class LowRankBranch(nn.Module):
    """A low-rank matrix beside a quantized layer, that reads its input before it is rounded.

    Args:
        down: Shape (rank, columns).
        up: Shape (rows, rank).
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
        """Return what the branch adds to a layer's output for an input."""
        added: torch.Tensor = layer.low_rank(x, self.down, self.up)
        return added


class _AddBranch:
    """Forward hook of a layer that adds its branch."""

    def __init__(self, branch: LowRankBranch) -> None:
        self.branch = branch

    def __call__(
        self, layer: QuantizedLayer, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Return the output with that of the branch."""
        added: torch.Tensor = self.branch(layer, args[0])
        return output + added


def branches_of(denoiser: nn.Module) -> dict[str, LowRankBranch]:
    """Return the branches of a denoiser by the name of their layer."""
    held = dict(denoiser.named_children()).get("branches", nn.ModuleDict())
    return {key.replace("/", "."): branch for key, branch in held.items()}  # type: ignore[operator]


def attach_branches(denoiser: nn.Module, branches: dict[str, LowRankBranch]) -> None:
    """Make branches part of a denoiser, each beside the quantized layer of its name.

    They stand in one module of the denoiser, so that its state holds them.
    """
    # The keys of a ModuleDict must not hold dots.
    held = nn.ModuleDict({name.replace(".", "/"): branch for name, branch in branches.items()})
    denoiser.add_module("branches", held)
    for name, branch in branches.items():
        denoiser.get_submodule(name).register_forward_hook(_AddBranch(branch))


@torch.no_grad()
def add_branches(denoiser: nn.Module, rank: int) -> list[str]:
    """Take the largest singular values out of every inner weight, into a branch of full precision.

    What is left has fewer outliers and less to multiply errors of the input with (SVDQuant, Li et
    al., ICLR 2025); its format and scales are searched anew. In full precision the denoiser
    computes the same as before.

    Args:
        denoiser: Quantized by `quantize`, open and without branches; changed in place.
        rank: Of each branch; a layer gets none where the branch would have as many weights as it.

    Returns:
        The names of the layers that got a branch.

    Raises:
        InputError: If the denoiser has no quantized layer, one that is sealed or has LoRAs, or
            branches already, or the rank is below 1.
    """
    check_range("rank", rank, 1, MAX_RANK)
    layers = quantized_layers(denoiser)
    if not layers or any(x.entries is not None or x.hub is not None for x in layers.values()):
        raise InputError("denoiser must have been quantized and not yet sealed or fine-tuned")
    if branches_of(denoiser):
        raise InputError("the denoiser has branches already")
    branches = {}
    for name, layer in layers.items():
        matrix = layer.weight.flatten(1)
        if position(name) != "inner" or rank * sum(matrix.shape) >= matrix.numel():
            continue
        identity = torch.eye(matrix.shape[1], device=matrix.device)
        branches[name] = LowRankBranch(*low_rank(matrix, identity, rank))
        rest = matrix - branches[name].up @ branches[name].down
        layer.weight = nn.Parameter(rest.view_as(layer.weight), requires_grad=False)
        layer.weight_quantizer = _searched(layer)
    attach_branches(denoiser, branches)
    return list(branches)


def _searched(layer: QuantizedLayer) -> Quantizer:
    """Return the quantizer of a layer's weight as it is now, of the kind and width that it had."""
    fmt = layer.weight_quantizer.format
    # Integers have no exponent.
    formats = float_formats(fmt.bits, signed=True) if fmt.exponent_bits else [fmt]
    fmt, scales, _ = search_rows(layer.weight, formats, ratios=WEIGHT_RATIOS)
    return Quantizer(fmt, scales.view_as(layer.weight_quantizer.scale))
