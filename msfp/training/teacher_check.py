"""Whether a full-precision denoiser is the one that a packed one was made from, by its weights."""

from __future__ import annotations

import torch
from torch import nn

from msfp.errors import InputError
from msfp.layers.packed import ScaledLayer, packed_layers

MAX_CAST = 0.02
"""How far a weight that is not quantized may be, relative to it: what casts make of it is a tenth
of that."""
MAX_LEAK = 0.012
"""The part of a weight that may be left where its branch has taken everything: what casts leave is
a fifth of that, noise of a tenth of the weights' standard deviation three times as much."""
SVD = 0.02
"""How far from orthogonal the rows of a branch may be that is as the SVD gave it."""
MAX_EXCESS = 0.15
"""How much farther than the nearest values of its grid the packed weight may be from the teacher's
in all layers. Refinement moves some layers far, but hardly those that read what is exact, and
fine-tuning moved them by a twentieth; noise of half the weights' standard deviation makes a
fifth."""


@torch.no_grad()
def check_weights(denoiser: nn.Module, original: nn.Module) -> None:
    """Raise InputError where the weights of the full-precision original are others.

    Weights that are not quantized must be the same, and a branch that is an SVD must be that of
    the teacher's weight. A packed weight may be far from what it was made of, where refinement
    made up for errors of its input; but not all of them.

    Args:
        denoiser: Quantized and packed.
        original: Of the same architecture.
    """
    layers = {n: e for n, e in packed_layers(denoiser).items() if isinstance(e, ScaledLayer)}
    own = dict(denoiser.named_parameters())
    excess: dict[str, float] = {}
    for name, value in original.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None and name.endswith(".weight"):
            _check_branch(name, layer, value)
            excess[name] = _excess(layer, value)
        elif value.dim() > 1 and name in own and own[name].shape == value.shape:
            off = _relative(own[name].to(value.device).float() - value, value)
            if off > MAX_CAST:
                raise _other(name, f"is {100 * off:.1f} % off")
            excess[name] = 0.0
    nearest = min(excess, key=lambda name: excess[name], default="")
    if nearest and not excess[nearest] <= MAX_EXCESS:
        raise _other(nearest, f"is {100 * excess[nearest]:.0f} % off, those of other layers more")


def _other(name: str, how: str) -> InputError:
    return InputError(f"original must be what was quantized: its weights are others: {name} {how}")


def _relative(off: torch.Tensor, value: torch.Tensor) -> float:
    """Return the norm of a difference, relative to a tensor's; 0 where there is no difference."""
    norms = (torch.linalg.vector_norm(each, dtype=torch.float32) for each in (off, value))
    norm, whole = (float(each) for each in norms)
    return norm / max(whole, 1e-30)


def _check_branch(name: str, layer: ScaledLayer, value: torch.Tensor) -> None:
    """Raise InputError where a layer's branch is the SVD of another weight."""
    if layer.branch_down is None or layer.branch_up is None:
        return
    down, up = layer.branch_down.float(), layer.branch_up.float()
    products = down @ down.mT
    if _relative(products - products.diag().diag(), products) > SVD:
        return  # fine-tuning has added to it
    matrix = value.to(down.device).float().flatten(1)
    left = torch.linalg.qr(up).Q.mT @ (matrix - up @ down)
    leak = _relative(left, matrix)
    if not leak <= MAX_LEAK:
        raise _other(name, f"has {100 * leak:.1f} % where its branch has taken everything")


def _excess(layer: ScaledLayer, value: torch.Tensor) -> float:
    """Return how much farther than the nearest values a packed weight is, relative to a weight."""
    packed = layer.quantized_weight(dtype=torch.float32)
    weight = value.to(packed.device).float()
    rest = weight
    if layer.branch_down is not None and layer.branch_up is not None:
        rest = weight - (layer.branch_up.float() @ layer.branch_down.float()).view_as(weight)
    quantizer, _ = layer.quantizers()
    return _relative(rest - packed, weight) - _relative(rest - quantizer(rest), weight)
