"""Print what the default recipe would take for large denoisers, by arithmetic alone.

python docs/estimate_large_models.py

The networks have their public sizes, and no memory: they are on the meta device. The rates are
those of the run that docs/large-models.md describes, one thread of an AMD EPYC (Zen 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msfp.layers.kinds import groups_of
from msfp.layers.selection import quantizable_layers
from msfp.ptq.estimate import FORWARDS, operations_of, svd_cost
from msfp.ptq.low_rank_branches import is_smaller
from msfp.ptq.refinement import MOST_COLUMNS, default_samples

RANK, POSITIONS, SCALE_BYTES = 16, 16384, 4
SEARCH = 2.5e-7
"""Seconds of the search for each weight."""
BRANCH = 3.6e-11
"""Seconds of a branch for each unit of `svd_cost`."""
RATE = 6.0e10
"""Operations in a second of moments, factorisations and rounding, beside other work."""
FORWARD_RATE = 8.8e10
"""Operations in a second of a forward in float32, as `tests/benchmarks` measured it."""


def unet(**config: Any) -> UNet2DConditionModel:
    """Return a UNet of Stable Diffusion."""
    return UNet2DConditionModel(sample_size=64, **config)


XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def words(length: int, width: int) -> torch.Tensor:
    """Return a prompt's embeddings."""
    return torch.empty(1, length, width)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "Stable Diffusion 1.5, 512x512": (
        lambda: unet(cross_attention_dim=768, attention_head_dim=8),
        lambda: {"sample": torch.empty(1, 4, 64, 64), "encoder_hidden_states": words(77, 768)},
    ),
    "SDXL, 1024x1024": (
        lambda: unet(**XL),
        lambda: {
            "sample": torch.empty(1, 4, 128, 128),
            "encoder_hidden_states": words(77, 2048),
            "added_cond_kwargs": {
                "text_embeds": torch.empty(1, 1280),
                "time_ids": torch.empty(1, 6),
            },
        },
    ),
    "PixArt, 1024x1024": (
        lambda: PixArtTransformer2DModel(
            sample_size=128, out_channels=8, caption_channels=4096, use_additional_conditions=False
        ),
        lambda: {
            "hidden_states": torch.empty(1, 4, 128, 128),
            "encoder_hidden_states": words(120, 4096),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3 medium, 1024x1024": (
        lambda: SD3Transformer2DModel(
            sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
            pos_embed_max_size=192,
        ),
        lambda: {
            "hidden_states": torch.empty(1, 16, 128, 128),
            "encoder_hidden_states": words(154, 4096),
            "pooled_projections": torch.empty(1, 2048),
        },
    ),
    "Flux, 1024x1024": (
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        lambda: {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": words(512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
            "guidance": torch.empty(1),
        },
    ),
    "Wan 14B, 480p, 81 frames": (
        lambda: WanTransformer3DModel(),
        lambda: {
            "hidden_states": torch.empty(1, 16, 21, 60, 104),
            "encoder_hidden_states": words(512, 4096),
        },
    ),
}  # fmt: skip
"""What makes each network, and the arguments of a forward."""


def row(name: str) -> list[str]:
    """Return the cells of a model."""
    make, arguments = MODELS[name]
    with torch.device("meta"), torch.no_grad():
        network, given = make(), arguments()
        with FlopCounterMode(display=False) as counter:
            network(timestep=torch.empty(1), return_dict=False, **given)
    layers = quantizable_layers(network)
    weights = sum(layer.weight.numel() for layer in layers.values())
    branches = [each.weight for each in layers.values() if is_smaller(each.weight, RANK)]
    matrices = [each.flatten(1).shape for each in branches]
    search = SEARCH * (weights + sum(each.numel() for each in branches))
    svd = BRANCH * sum(svd_cost(*shape) for shape in matrices)
    samples = default_samples(next(iter(given.values())).numel())
    shapes = [
        (groups_of(each), len(each.weight) // groups_of(each), each.weight[0].numel())
        for each in layers.values()
    ]
    refinement = sum(operations_of(*shape, POSITIONS) for shape in shapes) / RATE
    forward = counter.get_total_flops() / FORWARD_RATE
    size = weights / 2 + sum(2 * RANK * sum(shape) for shape in matrices)
    size += SCALE_BYTES * sum(len(layer.weight) for layer in layers.values())
    moments = 3 * 4 * max(groups * min(width, MOST_COLUMNS) ** 2 for groups, _, width in shapes)
    parameters = sum(each.numel() for each in network.parameters())
    return [
        name, f"{parameters / 1e9:.2f}", f"{size / 1e9:.1f}", f"{(search + svd) / 60:.0f}",
        f"{refinement / 60:.0f}", f"{forward:.0f}", str(samples),
        f"{FORWARDS * samples * forward / 3600:.1f}", f"{moments / 1e9:.1f}",
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    print(
        "| model | parameters, 10^9 | file, GB | search and branches, min | corrections, min | "
        "a forward, s | samples | their forwards, h | moments, GB |"
    )
    print("|---|" + "--:|" * 8)
    for name in MODELS:
        print("| " + " | ".join(row(name)) + " |")


if __name__ == "__main__":
    main()
