"""Small U-Nets, control networks, adapters and the transformers that older pipelines use."""

from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import nn

from .case import Case, noise

FRAMES = 3
BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
}
MOTION = {
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "cross_attention_dim": 24,
    "num_attention_heads": (2, 4),
    "motion_num_attention_heads": (4, 2),
    "motion_max_seq_length": 4,
}
HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "hidden_size": 32,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "transformer_num_layers": 6,
    "mlp_ratio": 2.0,
    "cross_attention_dim": 24,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 12,
    "text_len": 5,
    "text_len_t5": 4,
}
QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


class Multi(Case):
    """The case of a class that holds several models; its config is that of each of them."""

    def make(self, name: str) -> nn.Module:
        count = 1 if name.startswith("Qwen") else 2
        nets = [Case(self.config).make(name.replace("Multi", "")) for _ in range(count)]
        return Case({"controlnets": nets}).make(name)


class Shared(Case):
    """The case of a control network that shares modules with the Z-Image transformer."""

    def make(self, name: str) -> nn.Module:
        transformer = Case(
            {
                "in_channels": 4,
                "dim": 32,
                "n_layers": 1,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": 24,
                "axes_dims": [4, 6, 6],
                "axes_lens": [96, 16, 16],
            }
        ).make("ZImageTransformer2DModel")
        controlnet = super().make(name)
        return type(controlnet).from_transformer(controlnet, transformer)


def mask(rows: int, tokens: int) -> torch.Tensor:
    """Return a mask that hides the last token of the first row alone."""
    keep = torch.ones(rows, tokens, dtype=torch.long)
    keep[0, -1] = 0
    return keep


def added(rows: int) -> dict[str, torch.Tensor]:
    """Return the conditions of `ADDED`: a pooled text, and sizes and crops in pixels."""
    sizes = torch.tensor([[64.0, 48.0, 0.0, 8.0, 64.0, 64.0]])
    return {"text_embeds": noise(11, rows, 12), "time_ids": sizes.repeat(rows, 1)}


def image_call(rows: int) -> dict[str, Any]:
    """Return what text-to-image pipelines give their U-Nets and control networks."""
    return {
        "sample": noise(0, rows, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(1, rows, 5, 24),
        "return_dict": False,
    }


def video_call(rows: int) -> dict[str, Any]:
    """Return what text-to-video pipelines give their U-Nets."""
    return image_call(rows) | {
        "sample": noise(0, rows, 4, FRAMES, 8, 8),
        "cross_attention_kwargs": None,
    }


def motion_call(rows: int) -> dict[str, Any]:
    """Return what pipelines of motion modules give: the text is repeated for each frame."""
    text = noise(1, rows, 5, 24).repeat_interleave(FRAMES, dim=0)
    return image_call(rows) | {
        "sample": noise(0, rows, 4, FRAMES, 8, 8),
        "encoder_hidden_states": text,
    }


def codes(rows: int) -> torch.Tensor:
    """Return entries of a codebook of 18; the last of a vocabulary of 20 hides one to predict."""
    entries = (4 * noise(0, rows, 8, 8)).long()
    return torch.where(entries < 0, 19, entries.clamp(max=17))


def hunyuan_call(rows: int) -> dict[str, Any]:
    sizes = torch.tensor([[64.0, 48.0, 64.0, 64.0, 0.0, 8.0]])
    return {
        "hidden_states": noise(0, rows, 4, 8, 8),
        "timestep": torch.full((rows,), 500.0),
        "controlnet_cond": noise(1, rows, 4, 8, 8),
        "conditioning_scale": 0.8,
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "text_embedding_mask": mask(rows, 5),
        "encoder_hidden_states_t5": noise(3, rows, 4, 16),
        "text_embedding_mask_t5": mask(rows, 4),
        "image_meta_size": sizes.repeat(rows, 1),
        "style": torch.zeros(rows, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4)),
        "return_dict": False,
    }


def qwen_call(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(0, rows, 16, 16),
        "controlnet_cond": noise(1, rows, 16, 16),
        "conditioning_scale": 0.8,
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "encoder_hidden_states_mask": mask(rows, 5),
        "timestep": torch.full((rows,), 0.5),
        "img_shapes": [(1, 4, 4)] * rows,
        "return_dict": False,
    }


def cosmos_call(rows: int) -> dict[str, Any]:
    conditioned = torch.zeros(rows, 1, FRAMES, 1, 1)
    conditioned[:, :, 0] = 1
    return {
        "controls_latents": noise(0, rows, 4, FRAMES, 8, 8),
        "latents": noise(1, rows, 4, FRAMES, 8, 8),
        "timestep": 0.1 * conditioned + 0.5 * (1 - conditioned),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "condition_mask": conditioned.repeat(1, 1, 1, 8, 8),
        "conditioning_scale": 0.8,
        "padding_mask": torch.zeros(1, 1, 64, 64),
        "return_dict": False,
    }


def sparse_call(rows: int) -> dict[str, Any]:
    given = torch.zeros(rows, 1, FRAMES, 8, 8)
    given[:, :, 0] = 1
    return motion_call(rows) | {
        "controlnet_cond": noise(2, rows, 4, FRAMES, 8, 8) * given,
        "conditioning_mask": given,
        "conditioning_scale": 0.8,
        "guess_mode": False,
    }


UNETS = {
    "UNet1DModel": Case(
        # Its attentions have one head for each 32 channels.
        config={"extra_in_channels": 16, "time_embedding_dim": 16, "sample_size": 64},
        inputs=lambda rows: {"sample": noise(0, rows, 2, 64), "timestep": torch.tensor(0.5)},
    ),
    "UNet2DModel": Case(
        config=BLOCKS
        | {
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 16,
        },
        inputs=lambda rows: {"sample": noise(0, rows, 3, 8, 8), "timestep": torch.tensor(500)},
    ),
    "UNet2DConditionModel": Case(
        config=BLOCKS
        | ADDED
        | {
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 24,
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
        },
        inputs=lambda rows: (
            image_call(rows)
            | {
                "timestep_cond": None,
                "cross_attention_kwargs": None,
                "added_cond_kwargs": added(rows),
            }
        ),
    ),
    "UNet3DConditionModel": Case(
        config=BLOCKS
        | {
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 24,
            "attention_head_dim": 8,
        },
        inputs=video_call,
    ),
    "DreamLiteUNetModel": Case(
        config={
            "sample_size": 8,
            "block_out_channels": (16, 16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 24,
            "attention_head_dim": (2, 2, 4),
            "encoder_hid_dim": 20,
            "encoder_hid_dim_type": "text_proj_rms",
            "addition_embed_type": "time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 2 * 8,
        },
        # The image to edit is to the right of the noise.
        inputs=lambda rows: {
            "sample": noise(0, rows, 4, 8, 16),
            "timestep": torch.full((rows,), 500.0),
            "encoder_hidden_states": noise(1, rows, 5, 20),
            "encoder_attention_mask": mask(rows, 5),
            "added_cond_kwargs": {"time_ids": torch.tensor([[64.0, 48.0]]).repeat(rows, 1)},
            "return_dict": False,
        },
    ),
    "I2VGenXLUNet": Case(
        config=BLOCKS
        | {
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 24,
            "attention_head_dim": 8,
        },
        inputs=lambda rows: (
            video_call(rows)
            | {
                "fps": torch.full((rows,), 16),
                "image_latents": noise(2, rows, 4, FRAMES, 8, 8),
                "image_embeddings": noise(3, rows, 1, 24),
            }
        ),
    ),
    "Kandinsky3UNet": Case(
        # Which of its four levels have attention is not configurable.
        config={
            "time_embedding_dim": 32,
            "groups": 2,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "block_out_channels": (8, 16, 16, 24),
            "cross_attention_dim": 16,
            "encoder_hid_dim": 24,
        },
        inputs=lambda rows: (
            image_call(rows)
            | {"sample": noise(0, rows, 4, 16, 16), "encoder_attention_mask": mask(rows, 5)}
        ),
    ),
    "UNetMotionModel": Case(
        config=BLOCKS
        | MOTION
        | {"sample_size": 8, "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")},
        inputs=lambda rows: (
            motion_call(rows)
            | {"cross_attention_kwargs": None, "added_cond_kwargs": None, "return_dict": True}
        ),
    ),
    "UNetSpatioTemporalConditionModel": Case(
        # Its normalizations always have 32 groups, and one channel a group would hide the time.
        config={
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 3 * 8,
            "cross_attention_dim": 24,
            "num_attention_heads": (2, 4),
            "num_frames": FRAMES,
        },
        inputs=lambda rows: {
            "sample": noise(0, rows, FRAMES, 8, 8, 8),
            "timestep": torch.tensor(1.5),
            "encoder_hidden_states": noise(1, rows, 1, 24),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(rows, 1),
            "return_dict": False,
        },
    ),
    "StableCascadeUNet": Case(
        config={
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 24,
            "block_out_channels": (16, 32),
            "num_attention_heads": (2, 4),
            "down_num_layers_per_block": (1, 2),
            "up_num_layers_per_block": (2, 1),
            "up_blocks_repeat_mappers": (2, 1),
            "clip_text_in_channels": 20,
            "clip_text_pooled_in_channels": 12,
            "clip_image_in_channels": 10,
        },
        inputs=lambda rows: {
            "sample": noise(0, rows, 4, 8, 8),
            "timestep_ratio": torch.full((rows,), 0.5),
            "clip_text_pooled": noise(1, rows, 1, 12),
            "clip_text": noise(2, rows, 5, 20),
            "clip_img": noise(3, rows, 1, 10),
            "return_dict": False,
        },
    ),
    "UVit2DModel": Case(
        config={
            "hidden_size": 32,
            "cond_embed_dim": 12,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 5 * 8,
            "encoder_hidden_size": 24,
            "vocab_size": 20,
            "codebook_size": 18,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "downsample": True,
            "upsample": True,
            "block_num_heads": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "sample_size": 8,
        },
        inputs=lambda rows: {
            "input_ids": codes(rows),
            "micro_conds": torch.tensor([[64.0, 48.0, 0.0, 8.0, 6.0]]).repeat(rows, 1),
            "pooled_text_emb": noise(1, rows, 12),
            "encoder_hidden_states": noise(2, rows, 5, 24),
            "cross_attention_kwargs": None,
        },
    ),
    "MotionAdapter": Case(
        reason="A container of motion modules for UNetMotionModel, whose forward does nothing."
    ),
}

CONTROLS = {
    "ControlNetModel": Case(
        config=BLOCKS
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "cross_attention_dim": 24,
            "attention_head_dim": (2, 4),
            "conditioning_embedding_out_channels": (4, 8),
        },
        inputs=lambda rows: (
            image_call(rows)
            | {
                "controlnet_cond": noise(2, rows, 3, 16, 16),
                "conditioning_scale": 0.8,
                "guess_mode": False,
            }
        ),
    ),
    "ControlNetUnionModel": Case(
        config=BLOCKS
        | ADDED
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "cross_attention_dim": 24,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "conditioning_embedding_out_channels": (4, 8),
            "num_control_type": 3,
            "num_trans_channel": 16,
            "num_trans_head": 2,
            "num_proj_channel": 16,
        },
        inputs=lambda rows: (
            image_call(rows)
            | {
                "controlnet_cond": [noise(2, rows, 3, 16, 16), noise(3, rows, 3, 16, 16)],
                "control_type": torch.tensor([[1.0, 0.0, 1.0]]).repeat(rows, 1),
                "control_type_idx": [0, 2],
                "conditioning_scale": [0.8, 0.5],
                "guess_mode": False,
                "added_cond_kwargs": added(rows),
            }
        ),
    ),
    "CosmosControlNetModel": Case(
        config={
            "n_controlnet_blocks": 2,
            "in_channels": 10,
            "latent_channels": 6,
            "model_channels": 32,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "mlp_ratio": 2.0,
            "text_embed_dim": 24,
            "adaln_lora_dim": 8,
            "max_size": (4, 16, 16),
        },
        inputs=cosmos_call,
        reason="" if find_spec("torchvision") else "Its forward resizes a mask with torchvision.",
    ),
    "FluxControlNetModel": Case(
        config={
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 12,
            "guidance_embeds": True,
            "axes_dims_rope": [4, 6, 6],
            "num_mode": 3,
        },
        inputs=lambda rows: {
            "hidden_states": noise(0, rows, 16, 16),
            "controlnet_cond": noise(1, rows, 16, 16),
            "controlnet_mode": torch.ones(rows, 1, dtype=torch.long),
            "conditioning_scale": 0.8,
            "timestep": torch.full((rows,), 0.5),
            "guidance": torch.full((rows,), 3.5),
            "pooled_projections": noise(2, rows, 12),
            "encoder_hidden_states": noise(3, rows, 5, 24),
            "txt_ids": torch.zeros(5, 3),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            "joint_attention_kwargs": None,
            "return_dict": False,
        },
    ),
    "HunyuanDiT2DControlNetModel": Case(config=HUNYUAN, inputs=hunyuan_call),
    "HunyuanDiT2DMultiControlNetModel": Multi(
        saved=False,
        config=HUNYUAN,
        inputs=lambda rows: (
            hunyuan_call(rows)
            | {
                "controlnet_cond": [noise(1, rows, 4, 8, 8), noise(4, rows, 4, 8, 8)],
                "conditioning_scale": [0.8, 0.5],
            }
        ),
    ),
    "QwenImageControlNetModel": Case(config=QWEN, inputs=qwen_call),
    "QwenImageMultiControlNetModel": Multi(
        saved=False,
        config=QWEN,
        inputs=lambda rows: (
            qwen_call(rows)
            | {
                "controlnet_cond": [noise(1, rows, 16, 16), noise(4, rows, 16, 16)],
                "conditioning_scale": [0.8, 0.5],
            }
        ),
    ),
    "SanaControlNetModel": Case(
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
        },
        inputs=lambda rows: {
            "hidden_states": noise(0, rows, 4, 8, 8),
            "encoder_hidden_states": noise(1, rows, 5, 24),
            "encoder_attention_mask": mask(rows, 5),
            "timestep": torch.full((rows,), 500.0),
            "attention_kwargs": None,
            "controlnet_cond": noise(2, rows, 4, 8, 8),
            "conditioning_scale": 0.8,
            "return_dict": False,
        },
    ),
    "SD3ControlNetModel": Case(
        config={
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 12,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (1,),
        },
        inputs=lambda rows: {
            "hidden_states": noise(0, rows, 4, 8, 8),
            "timestep": torch.full((rows,), 500.0),
            "encoder_hidden_states": noise(1, rows, 5, 24),
            "pooled_projections": noise(2, rows, 12),
            "joint_attention_kwargs": None,
            "controlnet_cond": noise(3, rows, 4, 8, 8),
            "conditioning_scale": 0.8,
            "return_dict": False,
        },
    ),
    # It takes no more than the shape of its noisy sample.
    "SparseControlNetModel": Case(config=BLOCKS | MOTION, inputs=sparse_call),
    "ControlNetXSAdapter": Case(
        reason="A container of the control parts of UNetControlNetXSModel, without a forward."
    ),
    "UNetControlNetXSModel": Case(
        config={
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "cross_attention_dim": 24,
            "num_attention_heads": (2, 4),
            "ctrl_conditioning_embedding_out_channels": (4, 8),
            "ctrl_block_out_channels": (8, 16),
            "ctrl_num_attention_heads": (1, 2),
            "ctrl_max_norm_num_groups": 4,
        },
        inputs=lambda rows: (
            image_call(rows)
            | {
                "controlnet_cond": noise(2, rows, 3, 16, 16),
                "conditioning_scale": 0.8,
                "cross_attention_kwargs": None,
                "return_dict": True,
                "apply_control": True,
            }
        ),
    ),
    "ZImageControlNetModel": Shared(
        saved=False,
        trained=False,
        config={
            "control_layers_places": [0, 2],
            "control_in_dim": 5,
            "dim": 32,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
        },
        inputs=lambda rows: {
            "x": list(noise(0, rows, 4, 1, 8, 8)),
            "t": torch.full((rows,), 0.5),
            "cap_feats": list(noise(1, rows, 5, 24)),
            "control_context": noise(2, rows, 5, 1, 8, 8),
            "conditioning_scale": 0.8,
        },
    ),
    "T2IAdapter": Case(
        config={"channels": [8, 16], "num_res_blocks": 1},
        inputs=lambda rows: {"x": noise(0, rows, 3, 32, 32)},
    ),
    "Kandinsky6SRLatentUpscalerBank": Case(
        config={
            "in_channels": 4,
            "stage_channels": (16, 8, 8),
            "num_pre_blocks": 1,
            "num_mid_blocks": 1,
            "num_post_blocks": 1,
            "num_x2_adapter_blocks": 1,
        },
        inputs=lambda rows: {
            "latents": noise(0, rows, 4, FRAMES, 8, 8),
            "scale": 2,
            "return_dict": False,
        },
    ),
}

TRANSFORMERS = {
    "PriorTransformer": Case(
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "embedding_dim": 24,
            "num_embeddings": 5,
        },
        inputs=lambda rows: {
            "hidden_states": noise(0, rows, 24),
            "timestep": torch.tensor(500),
            "proj_embedding": noise(1, rows, 24),
            "encoder_hidden_states": noise(2, rows, 5, 24),
            "attention_mask": mask(rows, 5).bool(),
        },
    ),
    "T5FilmDecoder": Case(
        config={
            "input_dims": 12,
            "targets_length": 8,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 40,
        },
        inputs=lambda rows: {
            "encodings_and_masks": [
                (noise(1, rows, 5, 32), mask(rows, 5).bool()),
                (noise(2, rows, 8, 32), torch.ones(rows, 8, dtype=torch.bool)),
            ],
            "decoder_input_tokens": noise(0, rows, 8, 12),
            "decoder_noise_time": torch.full((rows,), 0.5),
        },
    ),
    "Transformer2DModel": Case(
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 24,
            "num_layers": 2,
            "norm_num_groups": 8,
            "cross_attention_dim": 20,
        },
        inputs=lambda rows: {
            "hidden_states": noise(0, rows, 24, 8, 8),
            "encoder_hidden_states": noise(1, rows, 5, 20),
            "cross_attention_kwargs": None,
            "attention_mask": None,
            "encoder_attention_mask": mask(rows, 5),
            "return_dict": False,
        },
    ),
    "TransformerTemporalModel": Case(
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 24,
            "norm_num_groups": 8,
        },
        # A row is a run of frames.
        inputs=lambda rows: {
            "hidden_states": noise(0, rows * FRAMES, 24, 8, 8),
            "num_frames": FRAMES,
            "cross_attention_kwargs": None,
            "return_dict": False,
        },
    ),
}

CASES: dict[str, Case] = UNETS | CONTROLS | TRANSFORMERS
