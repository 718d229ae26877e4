"""Checks, by its weights, that a full-precision denoiser is the original of a packed one."""

from __future__ import annotations

import torch
from torch import nn

from msfp.errors import InputError
from msfp.layers.packed import packed_layers
from msfp.layers.scaled import ScaledLayer

MAX_CAST = 0.02
"""Largest relative error of a weight that is not quantized; casts cause a tenth of it."""
MAX_LEAK = 0.012
"""Largest fraction of a weight that may remain in the subspace of its low-rank branch.

The branch has taken everything there. Casts leave a fifth of this limit. Noise of a tenth of the
weights' standard deviation leaves three times the limit.
"""
SVD = 0.02
"""Largest deviation of the columns of a branch from orthogonality, if they are still an SVD."""
MAX_EXCESS = 0.15
"""Limit of a packed weight's excess distance from the teacher's, in the layer with the least.

The excess is the distance beyond that of the nearest values of the grid. Refinement moves some
layers far, but hardly moves layers with exact inputs. Fine-tuning moved these by a twentieth. Noise
of half the weights' standard deviation causes a fifth.
"""


@torch.no_grad()
def check_weights(denoiser: nn.Module, original: nn.Module, argument: str = "original") -> None:
    """Raise InputError unless a denoiser was made from the weights of the full-precision original.

    Weights that are not quantized must be equal. A low-rank branch that is an SVD must be that of
    the teacher's weight. A packed weight may be far from the teacher's if refinement corrected
    errors of its input. Not all packed weights may be far.

    Args:
        denoiser: Quantized and packed.
        original: The full-precision denoiser, of the same architecture.
        argument: Its name in error messages.
    """
    layers = {n: e for n, e in packed_layers(denoiser).items() if isinstance(e, ScaledLayer)}
    own = dict(denoiser.named_parameters())
    excess: dict[str, float] = {}
    for name, value in original.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None and name.endswith(".weight"):
            _check_branch(name, layer, value, argument)
            excess[name] = _excess(layer, value)
        elif value.dim() > 1 and name in own and own[name].shape == value.shape:
            off = _relative(own[name].to(value.device).float() - value, value)
            if off > MAX_CAST:
                raise _other(argument, name, f"is {100 * off:.1f} % off")
            excess[name] = 0.0
    nearest = min(excess, key=lambda name: excess[name], default="")
    if nearest and not excess[nearest] <= MAX_EXCESS:
        raise _other(
            argument, nearest, f"is {100 * excess[nearest]:.0f} % off, those of other layers more"
        )


def _other(argument: str, name: str, how: str) -> InputError:
    return InputError(
        f"{argument} must be the model that was quantized, but its weights differ: {name} {how}"
    )


def _relative(off: torch.Tensor, value: torch.Tensor) -> float:
    """Return the norm of a difference relative to that of a tensor; 0 for no difference."""
    norms = (torch.linalg.vector_norm(each, dtype=torch.float32) for each in (off, value))
    norm, whole = (float(each) for each in norms)
    return norm / max(whole, 1e-30)


def _check_branch(name: str, layer: ScaledLayer, value: torch.Tensor, argument: str) -> None:
    """Raise InputError if a layer's low-rank branch is the SVD of another weight."""
    if layer.branch_down is None or layer.branch_up is None:
        return
    down, up = layer.branch_down.float(), layer.branch_up.float()
    products = up.mT @ up
    if _relative(products - products.diag().diag(), products) > SVD:
        return  # fine-tuning has changed the branch
    matrix = value.to(down.device).float().flatten(1)
    left = torch.linalg.qr(up).Q.mT @ (matrix - up @ down)
    leak = _relative(left, matrix)
    if not leak <= MAX_LEAK:
        raise _other(
            argument, name, f"has {100 * leak:.1f} % where its branch has taken everything"
        )


def _excess(layer: ScaledLayer, value: torch.Tensor) -> float:
    """Return the distance of a packed weight beyond that of the nearest values, as a fraction."""
    packed = layer.quantized_weight(dtype=torch.float32)
    weight = value.to(packed.device).float()
    rest = weight
    if layer.branch_down is not None and layer.branch_up is not None:
        rest = weight - (layer.branch_up.float() @ layer.branch_down.float()).view_as(weight)
    rest = layer.unrotated_weight(rest)
    quantizer, _ = layer.quantizers()
    return _relative(rest - packed, weight) - _relative(rest - quantizer(rest), weight)
