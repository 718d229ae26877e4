"""Low-rank branches of full precision beside quantized layers, for the largest part of weights."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fpformats import search
from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.config import MAX_BITS, MAX_RANK
from msfp.errors import InputError
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.lora.low_rank import low_rank
from msfp.layers.trainable import TrainableLayer, untrained_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.search.layer_search import WEIGHT_RATIOS
from msfp.search.schemes import formats_like
from msfp.support.checks import check_whole


@torch.no_grad()
def add_branches(model: DiffusionPipeline | nn.Module, rank: int) -> list[str]:
    """Take the largest singular values out of weights, into low-rank branches, in place.

    What is left has fewer outliers and less to multiply errors of the input with (SVDQuant, Li et
    al., ICLR 2025); its format and scales are searched again. In full precision the denoiser
    computes the same as before.

    Args:
        model: Quantized by `quantize`, trainable and without branches: a pipeline or its denoiser.
        rank: Of each branch. A layer gets none where it would have as many weights as the layer,
            or where the layer has 8 bits.

    Returns:
        The names of the layers that got a branch.

    Raises:
        InputError: If the denoiser has no quantized layer, one that is packed or has LoRAs, or
            branches already, or the rank is below 1.
    """
    denoiser = denoiser_of(model)
    check_whole("rank", rank, 1, MAX_RANK)
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
    attach_again(denoiser)
    return names


def _add_branch(layer: TrainableLayer, rank: int) -> None:
    """Take the largest singular values out of a layer's weight."""
    dtype = layer.weight.dtype
    matrix = layer.weight.float().flatten(1)
    # Of 16 bits, as they are stored; in memory as a loader lays them out, since products may depend
    # on strides in the last bit.
    halves = (factor.half() for factor in low_rank(matrix, rank))
    down, up = (torch.empty(f.shape, dtype=dtype, device=f.device).copy_(f) for f in halves)
    layer.branch_down, layer.branch_up = (nn.Parameter(f, requires_grad=False) for f in (down, up))
    rest = (matrix - up.float() @ down.float()).view_as(layer.weight)
    layer.weight = nn.Parameter(rest.to(dtype), requires_grad=False)
    layer.weight_quantizer = _searched(rest, layer.weight_quantizer)


def _searched(weight: torch.Tensor, old: Quantizer) -> Quantizer:
    """Return the quantizer of a weight, of the kind, width and granularity of another."""
    axis = 0 if len(old.scale.unique()) > 1 else None
    choice = search(weight, formats_like(old.format), ratios=WEIGHT_RATIOS, axis=axis)
    scale = torch.as_tensor(choice.scale, dtype=torch.float32, device=weight.device)
    return Quantizer(choice.format, scale.expand(old.scale.shape))
