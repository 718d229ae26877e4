"""Low-rank branches beside quantized layers, for the largest part of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats import search
from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.config import MAX_BITS, MAX_RANK
from msfp.errors import InputError
from msfp.layers.block_quantizer import BlockQuantizer
from msfp.layers.branch_factor import INPUT_FORMAT
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.kinds import groups_of
from msfp.layers.lora.low_rank import low_rank
from msfp.layers.trainable import TrainableLayer, untrained_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.ptq.channel_sizes import column_weights
from msfp.ptq.state import QuantizationState, on_device, quantizer_of, quantizer_state
from msfp.search.layer_search import WEIGHT_RATIOS
from msfp.search.schemes import formats_like
from msfp.support.checks import check_choice, check_whole
from msfp.support.malloc import release_memory
from msfp.support.offloading import at_work
from msfp.support.paging import PageFolder
from msfp.support.progress import Progress, counted, no_progress

BRANCHES = "branches"
"""Stage of the state."""


def add_branches(
    model: DiffusionPipeline | nn.Module, rank: int, *, bits: Literal[8, 16] = 8
) -> list[str]:
    """Move the largest singular values of weights into low-rank branches, in place.

    The remaining weight has fewer outliers, and its smaller values amplify errors of the input less
    (SVDQuant, Li et al., ICLR 2025). Its format and scales are searched again. In full precision
    the denoiser still computes the same function.

    Args:
        model: A pipeline or its denoiser, quantized by `quantize`, trainable and without low-rank
            branches.
        rank: Rank of each low-rank branch. A layer gets no branch if the branch would have as many
            weights as the layer, or if the layer has 8 bits.
        bits: Bits of the inputs and first factors of branches, as `RefinementConfig.branch_bits`.

    Returns:
        The names of the layers that got a low-rank branch.

    Raises:
        InputError: If the denoiser has no quantized layer, or has one that is packed or has LoRAs,
            has low-rank branches already, or the rank is below 1 or the bits are not 8 or 16.
    """
    check_choice("bits", bits, (8, 16))
    check_whole("rank", rank, 1, MAX_RANK)
    denoiser = denoiser_of(model)
    return add_kept_branches(denoiser, dict.fromkeys(untrained_layers(denoiser), rank), bits, None)


@torch.no_grad()
def add_kept_branches(
    denoiser: nn.Module,
    ranks: Mapping[str, int],
    bits: Literal[8, 16],
    state: QuantizationState | None,
    pages: PageFolder | None = None,
    progress: Progress = no_progress,
    sizes: Mapping[str, torch.Tensor] | None = None,
) -> list[str]:
    """Add branches as `add_branches` does, and keep each in a state, from which a run resumes.

    Each layer has a rank, 0 for no branch. The rest of each weight is put into `pages`, where there
    is such a folder. Columns are weighed by the `sizes` of a layer's input channels, if there are
    some.
    """
    layers = untrained_layers(denoiser)
    if any(layer.branch_up is not None for layer in layers.values()):
        raise InputError("the denoiser has low-rank branches already")
    names, done = [], counted(progress, "adding branches", len(layers))
    for name, layer in layers.items():
        rank, narrow = ranks[name], layer.weight_quantizer.format.bits < MAX_BITS
        if rank and narrow and is_smaller(layer.weight, rank):
            whole = layer.weight
            with at_work(layer):
                if not _restored(name, layer, state):
                    _add_branch(layer, rank, (sizes or {}).get(name))
                    _keep(name, layer, state)
                if (
                    bits == INPUT_FORMAT.bits
                    and groups_of(layer) == 1
                    and layer.branch_grid is not None
                ):
                    scale, zero = (torch.tensor(each) for each in layer.branch_grid)
                    inputs = Quantizer(INPUT_FORMAT, scale, zero)
                    layer.branch_input = inputs.to(layer.weight.device)
            if pages is not None:
                pages.drop(whole)
                pages.put_away(layer.weight)
                release_memory()
            names.append(name)
        done(1)
    attach_again(denoiser)
    return names


def is_smaller(weight: torch.Tensor, rank: int) -> bool:
    """Return whether a low-rank branch has fewer numbers than a weight.

    Example:
        >>> is_smaller(torch.empty(64, 64), 16), is_smaller(torch.empty(64, 64), 32)
        (True, False)
    """
    rows, columns = weight.flatten(1).shape
    return rank * (rows + columns) < rows * columns


def _add_branch(layer: TrainableLayer, rank: int, sizes: torch.Tensor | None = None) -> None:
    """Move the largest singular values of a layer's weight into a low-rank branch."""
    dtype = layer.weight.dtype
    matrix = layer.weight.float().flatten(1)
    # Rounded to 16 bits, as in files, and laid out in memory as after loading: strides can change
    # the last bit of products.
    weights = column_weights(layer, sizes)
    if weights is None:
        factors = low_rank(matrix, rank)
    else:
        weights = weights.to(matrix.device)
        weighted, rows = low_rank(matrix * weights, rank)
        factors = weighted / weights, rows
    halves = (factor.half() for factor in factors)
    down, up = (torch.empty(f.shape, dtype=dtype, device=f.device).copy_(f) for f in halves)
    layer.branch_down, layer.branch_up = (nn.Parameter(f, requires_grad=False) for f in (down, up))
    rest = (matrix - up.float() @ down.float()).view_as(layer.weight)
    layer.weight = nn.Parameter(rest.to(dtype), requires_grad=False)
    layer.weight_quantizer = searched_again(rest, layer.weight_quantizer)


def _restored(name: str, layer: TrainableLayer, state: QuantizationState | None) -> bool:
    """Give a layer the branch that was kept of it, if any; return whether there was one."""
    kept = None if state is None else state.load(BRANCHES, name)
    if kept is None:
        return False
    facts, tensors = kept[0], on_device(kept[1], layer.weight)
    down, up = tensors["down"], tensors["up"]
    layer.branch_down, layer.branch_up = (nn.Parameter(f, requires_grad=False) for f in (down, up))
    layer.weight = nn.Parameter(tensors["weight"], requires_grad=False)
    found = quantizer_of("quantizer", facts, tensors)
    layer.weight_quantizer = layer.weight_quantizer if found is None else found
    return True


def _keep(name: str, layer: TrainableLayer, state: QuantizationState | None) -> None:
    """Keep the branch of a layer, and the rest of its weight."""
    if state is None or layer.branch_down is None or layer.branch_up is None:
        return
    facts, tensors = quantizer_state("quantizer", layer.weight_quantizer)
    tensors |= {"down": layer.branch_down, "up": layer.branch_up, "weight": layer.weight}
    state.save(BRANCHES, name, facts, tensors)


def searched_again(weight: torch.Tensor, old: Quantizer) -> Quantizer:
    """Return a new quantizer of a weight, with the kind, width and granularity of the old one."""
    if isinstance(old, BlockQuantizer):
        return BlockQuantizer.of(old.name, weight)
    axis = 0 if len(old.scale.unique()) > 1 else None
    choice = search(weight, formats_like(old.format), ratios=WEIGHT_RATIOS, axis=axis)
    scale = torch.as_tensor(choice.scale, dtype=torch.float32, device=weight.device)
    return Quantizer(choice.format, scale.expand(old.scale.shape))
