"""Tiny denoisers of every family, with random weights, and arguments to call them with."""

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

BLOCKS = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def unet():
    return UNet2DModel(
        **BLOCKS,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )


def conditional_unet(**config):
    return UNet2DConditionModel(
        **BLOCKS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        **config,
    )


def xl_unet():
    return conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        use_linear_projection=True,
        transformer_layers_per_block=2,
    )


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )


def pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
    )


def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
    )


def flux():
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


FAMILIES = {
    "unet": unet,
    "conditional_unet": conditional_unet,
    "xl_unet": xl_unet,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
}
ENDS = {
    "unet": {"conv_in", "conv_out"},
    "conditional_unet": {"conv_in", "conv_out"},
    "xl_unet": {"conv_in", "conv_out"},
    "dit": {"pos_embed.proj", "proj_out_2"},
    "pixart": {"pos_embed.proj", "proj_out"},
    "sd3": {"pos_embed.proj", "proj_out"},
    "flux": {"x_embedder", "proj_out"},
}


def make(family):
    """A family's denoiser; zero-initialised weights are made random as well."""
    torch.manual_seed(0)
    denoiser = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return denoiser


def call(denoiser, dtype=torch.float32, timestep=500):
    """The prediction of a denoiser of any family for one fixed call."""

    def noise(*shape):
        draw = torch.Generator().manual_seed(len(shape))
        return torch.randn(*shape, generator=draw).to(dtype)

    time = torch.tensor([timestep, timestep])
    calls = {
        UNet2DModel: lambda: ((noise(2, 3, 8, 8), timestep), {}),
        UNet2DConditionModel: lambda: (
            (noise(2, 4, 8, 8), timestep, noise(2, 5, 8)),
            {"added_cond_kwargs": {"text_embeds": noise(2, 8), "time_ids": noise(2, 6)}},
        ),
        DiTTransformer2DModel: lambda: (
            (noise(2, 4, 8, 8),),
            {"timestep": time, "class_labels": torch.tensor([1, 2])},
        ),
        PixArtTransformer2DModel: lambda: (
            (noise(2, 4, 8, 8),),
            {"encoder_hidden_states": noise(2, 5, 8), "timestep": time},
        ),
        SD3Transformer2DModel: lambda: (
            (noise(2, 4, 8, 8),),
            {
                "encoder_hidden_states": noise(2, 5, 8),
                "pooled_projections": noise(2, 8),
                "timestep": time,
            },
        ),
        FluxTransformer2DModel: lambda: (
            (noise(2, 16, 16),),
            {
                "encoder_hidden_states": noise(2, 5, 8),
                "pooled_projections": noise(2, 8),
                "timestep": time / 1000,
                "img_ids": torch.zeros(16, 3),
                "txt_ids": torch.zeros(5, 3),
            },
        ),
    }
    args, kwargs = calls[type(denoiser)]()
    with torch.no_grad():
        return denoiser(*args, **kwargs, return_dict=False)[0]
