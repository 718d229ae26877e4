"""Small transformers of diffusers that denoise video, audio and other sequences."""

from typing import Any

import torch
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
    get_3d_rotary_pos_embed,
    get_3d_rotary_pos_embed_allegro,
)

from .case import Case, noise, the


def steps(rows: int, *shape: int, value: int = 500) -> torch.Tensor:
    """Return the whole timestep of each row, as schedulers of discrete steps give it."""
    return torch.full((rows, *shape), value)


def times(rows: int, *shape: int, value: float = 500.0) -> torch.Tensor:
    """Return the fractional timestep of each row, as schedulers of flow matching give it."""
    return torch.full((rows, *shape), value)


def mask(rows: int, tokens: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return a mask of text tokens of which only the last one of the first row is not there."""
    values = torch.ones(rows, tokens, dtype=dtype)
    values[0, -1] = 0
    return values


def patches(frames: int, height: int, width: int) -> torch.Tensor:
    """Return the place of each patch of a video, a row of its frame, line and column."""
    axes = torch.arange(frames), torch.arange(height), torch.arange(width)
    return torch.cartesian_prod(*axes)


def turns(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of a rotary embedding, equal for both channels of a pair."""
    angles = noise(seed, *shape).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def cogvideox(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 2, 4, 8, 8),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "timestep": steps(rows),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 2),
        "attention_kwargs": None,
        "return_dict": False,
    }


def consisid(rows: int) -> dict[str, Any]:
    return {
        **cogvideox(rows),
        "hidden_states": noise(1, rows, 2, 8, 8, 8),
        "id_vit_hidden": [noise(3 + scale, rows, 6, 20) for scale in range(5)],
        "id_cond": noise(8, rows, 28),
    }


def latte(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 4, 2, 8, 8),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "timestep": steps(rows),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


def allegro(rows: int) -> dict[str, Any]:
    *frequencies, frames, height, width = get_3d_rotary_pos_embed_allegro(
        24, ((0, 0), (4, 4)), (4, 4), 2, (2.2, 2.0, 2.0)
    )
    positions = torch.cartesian_prod(frames.long(), height.long(), width.long())
    return {
        "hidden_states": noise(1, rows, 4, 2, 8, 8),
        "encoder_hidden_states": noise(2, rows, 5, 20),
        "encoder_attention_mask": mask(rows, 5),
        "timestep": steps(rows),
        "image_rotary_emb": (tuple(frequencies), tuple(positions.T[:, None].contiguous())),
        "return_dict": False,
    }


def anyflow(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 2, 4, 8, 8),
        "timestep": times(rows, 2),
        "r_timestep": times(rows, 2, value=250.0),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "attention_kwargs": None,
        "return_dict": False,
    }


def anyflow_far(rows: int) -> dict[str, Any]:
    # The last chunk, of three frames, after three of one frame: the first of them is compressed.
    cache = {
        layer: {
            "full_cache": torch.stack([noise(3 + layer, rows, 2, 3 * 3 * 16, 16)] * 2),
            "compressed_cache": torch.stack([noise(5 + layer, rows, 2, 2 * 3 * 4, 16)] * 2),
        }
        for layer in range(2)
    }
    return {
        "hidden_states": noise(1, rows, 3, 4, 8, 8),
        "timestep": times(rows, 3),
        "r_timestep": times(rows, 3, value=250.0),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "attention_kwargs": None,
        "return_dict": False,
        "chunk_partition": [1, 1, 1, 3],
        "kv_cache": cache,
        "kv_cache_flag": {"num_cached_chunks": 3, "is_cache_step": False},
    }


def wan(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 4, 2, 8, 8),
        "timestep": steps(rows),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "attention_kwargs": None,
        "return_dict": False,
    }


def wan_image(rows: int, channels: int = 9, frames: int = 2) -> dict[str, Any]:
    # The class takes the last 512 tokens for text, and those before them for the image.
    return {
        **wan(rows),
        "hidden_states": noise(1, rows, channels, frames, 8, 8),
        "encoder_hidden_states": noise(2, rows, 512, 24),
        "encoder_hidden_states_image": noise(3, rows, 3, 20),
    }


def wan_animate(rows: int) -> dict[str, Any]:
    return {
        **wan_image(rows, 12, 3),
        "pose_hidden_states": noise(4, rows, 4, 2, 8, 8),
        "face_pixel_values": noise(5, rows, 3, 5, 8, 8),
        "motion_encode_batch_size": 4,
    }


def wan_animate_2(rows: int) -> dict[str, Any]:
    # The pass that extracts the reference: the other one needs its cache, and a compiled mask.
    return {
        "hidden_states": list(noise(1, rows, 4, 2, 8, 8)),
        "timestep": times(rows),
        "encoder_hidden_states": list(noise(2, rows, 5, 24)),
        "encoder_hidden_states_image": noise(3, rows, 3, 1280),
        "condition_latents": list(noise(4, rows, 5, 2, 8, 8)),
        "kv_cache": the("transformer_wan_animate_2", "WanAnimate2KVCache")(2),
        "kv_cache_mode": "extract",
        "seq_len": 32,
        "offset_grid_sizes": torch.tensor([[2, 4, 4]] * rows),
    }


def wan_vace(rows: int) -> dict[str, Any]:
    return {
        **wan(rows),
        "control_hidden_states": noise(3, rows, 12, 2, 8, 8),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
    }


def skyreels(rows: int) -> dict[str, Any]:
    return {
        **wan(rows),
        "timestep": steps(rows, 2),
        "enable_diffusion_forcing": True,
        "fps": [1] * rows,
    }


def cosmos(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 4, 2, 8, 8),
        "timestep": times(rows, value=0.5),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 64, 64),
        "return_dict": False,
    }


def cosmos3(rows: int) -> dict[str, Any]:
    # A sequence of 4 tokens of text, 3 * 2 * 2 of vision, whose first frame is given, 5 of sound.
    text, vision, sound = torch.arange(4), 4 + torch.arange(12), 16 + torch.arange(5)
    grid, beats = patches(3, 2, 2).T + 15004, torch.arange(5).expand(3, -1) + 15004
    return {
        "input_ids": torch.tensor([5, 17, 3, 40]),
        "text_indexes": text,
        "position_ids": torch.cat([text.expand(3, -1), grid, beats], dim=1),
        "und_len": 4,
        "sequence_length": 21,
        "vision_tokens": [noise(1, rows, 4, 3, 4, 4)],
        "vision_token_shapes": [(3, 2, 2)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision[4:],
        "vision_timesteps": times(8),
        "vision_noisy_frame_indexes": [torch.tensor([1, 2])],
        "sound_tokens": [noise(2, 6, 5)],
        "sound_token_shapes": [(5, 1, 1)],
        "sound_sequence_indexes": sound,
        "sound_mse_loss_indexes": sound.clone(),
        "sound_timesteps": times(5),
        "sound_noisy_frame_indexes": [torch.arange(5)],
        "return_dict": False,
    }


def easyanimate(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 4, 2, 8, 8),
        "timestep": times(rows),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "return_dict": False,
    }


def helios(rows: int) -> dict[str, Any]:
    long, middle, short, frames = torch.arange(10)[None].split([4, 2, 2, 2], dim=1)
    return {
        **wan(rows),
        "indices_hidden_states": frames,
        "indices_latents_history_short": short,
        "indices_latents_history_mid": middle,
        "indices_latents_history_long": long,
        "latents_history_short": noise(3, rows, 4, 2, 8, 8),
        "latents_history_mid": noise(4, rows, 4, 2, 8, 8),
        "latents_history_long": noise(5, rows, 4, 4, 8, 8),
    }


def hunyuan_video(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 4, 2, 8, 8),
        "timestep": times(rows),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "encoder_attention_mask": mask(rows, 5),
        "pooled_projections": noise(3, rows, 12),
        "guidance": times(rows, value=6000.0),
        "attention_kwargs": None,
        "return_dict": False,
    }


def hunyuan_video15(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 9, 2, 4, 4),
        "image_embeds": noise(2, rows, 3, 20),
        "timestep": times(rows),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": noise(3, rows, 5, 24),
        "encoder_attention_mask": mask(rows, 5),
        "encoder_hidden_states_2": noise(4, rows, 4, 12),
        "encoder_attention_mask_2": mask(rows, 4),
    }


def hunyuan_framepack(rows: int) -> dict[str, Any]:
    first, coarse, middle, last, frames = torch.arange(10).split([1, 4, 2, 1, 2])
    return {
        **hunyuan_video(rows),
        "image_embeds": noise(4, rows, 3, 20),
        "indices_latents": frames,
        "latents_clean": noise(5, rows, 4, 2, 8, 8),
        "indices_latents_clean": torch.cat([first, last]),
        "latents_history_2x": noise(6, rows, 4, 2, 8, 8),
        "indices_latents_history_2x": middle,
        "latents_history_4x": noise(7, rows, 4, 4, 8, 8),
        "indices_latents_history_4x": coarse,
    }


def kandinsky5(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 2, 8, 8, 9),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "pooled_projections": noise(3, rows, 12),
        "timestep": times(rows),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(5),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
        "return_dict": True,
    }


def kandinsky6(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 2, 8, 8, 9),
        "audio_hidden_states": noise(2, rows, 6, 5),
        "encoder_hidden_states": noise(3, rows, 5, 24),
        "pooled_projections": noise(4, rows, 12),
        "timestep": times(rows),
        "visual_rope_pos": None,
        "encoder_attention_mask": mask(rows, 5, torch.bool),
        "visual_token_type_ids": None,
        "return_dict": False,
    }


def kandinsky6_sr(rows: int) -> dict[str, Any]:
    anchor = torch.zeros(rows, 2, 8, 8, 5)
    return {
        "hidden_states": torch.cat([noise(1, rows, 2, 8, 8, 4), anchor], dim=-1),
        "timestep": times(rows),
        "return_dict": False,
    }


def ltx(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 2 * 4 * 4, 8),
        "encoder_hidden_states": noise(2, rows, 5, 20),
        "timestep": times(rows),
        "encoder_attention_mask": mask(rows, 5),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
        "return_dict": False,
    }


def mochi(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 4, 2, 8, 8),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "timestep": times(rows),
        "encoder_attention_mask": mask(rows, 5, torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


def ltx2(rows: int) -> dict[str, Any]:
    # Places in pixels and seconds, of which the first frame has one pixel instead of eight.
    starts = patches(2, 4, 4).T[None].repeat(rows, 1, 1).float()
    places = torch.stack([starts, starts + 1], dim=-1) * torch.tensor([8, 32, 32])[:, None, None]
    places[:, 0] = (places[:, 0] - 7).clamp(min=0) / 24
    beats = torch.arange(6.0) * 4
    spans = torch.stack([(beats - 3).clamp(min=0), beats + 1], dim=-1) / 100
    return {
        "hidden_states": noise(1, rows, 32, 8),
        "audio_hidden_states": noise(2, rows, 6, 12),
        "encoder_hidden_states": noise(3, rows, 5, 20),
        "audio_encoder_hidden_states": noise(4, rows, 5, 20),
        "timestep": times(rows),
        "sigma": times(rows),
        "encoder_attention_mask": mask(rows, 5),
        "audio_encoder_attention_mask": mask(rows, 5),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "fps": 24.0,
        "audio_num_frames": 6,
        "video_coords": places,
        "audio_coords": spans.expand(rows, 1, -1, -1),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": False,
        "attention_kwargs": None,
        "return_dict": False,
    }


def minimax_h3(rows: int) -> dict[str, Any]:
    # A sequence of 5 tokens of text, 4 of audio and 2 * 2 * 2 of video, whose first frame is given.
    text, audio, video = torch.arange(17).split([5, 4, 8])
    positions = torch.zeros(17, 3, dtype=torch.float64)
    positions[text, 0] = text.double()
    positions[audio, 0] = torch.arange(4.0, dtype=torch.float64) / 2 + 5
    positions[video] = patches(2, 2, 2).double() + torch.tensor([5, 0, 0])
    return {
        "hidden_states": noise(1, rows, 8, 16),
        "audio_hidden_states": noise(2, rows, 4, 6),
        "encoder_hidden_states": noise(3, rows, 5, 24),
        "timestep": torch.tensor([10.0, 500.0]),
        "timestep_indices": torch.tensor([1] * 9 + [0] * 4 + [1] * 4),
        "attention_kwargs": None,
        "return_dict": False,
        "token_tags": torch.tensor([1] * 5 + [2] * 4 + [0] * 8),
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def motif_video(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 9, 2, 8, 8),
        "timestep": times(rows),
        "image_embeds": noise(2, rows, 3, 20),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": noise(3, rows, 5, 24),
        "encoder_attention_mask": mask(rows, 5),
    }


def sana_video(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 4, 2, 8, 8),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "encoder_attention_mask": mask(rows, 5),
        "timestep": times(rows),
        "return_dict": False,
        "attention_kwargs": None,
    }


def sana_wm(rows: int) -> dict[str, Any]:
    # The first frame is given. The camera moves sideways: its pose, and its focal point.
    pose = torch.eye(4).repeat(rows, 3, 1, 1)
    pose[:, :, 0, 3] = torch.arange(3.0) / 4
    focus = torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(rows, 3, 4)
    return {
        "hidden_states": noise(1, rows, 4, 3, 4, 4),
        "timestep": torch.tensor([0.0, 500.0, 500.0]).repeat(rows, 1, 1),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "return_dict": False,
        "data_info": {"img_hw": torch.tensor([[128.0, 128.0]])},
        "mask": mask(rows, 5),
        "camera_conditions": torch.cat([pose.flatten(2), focus], dim=-1),
        "chunk_plucker": noise(3, rows, 12, 3, 4, 4),
    }


def sana_wm_refiner(rows: int) -> dict[str, Any]:
    cache = the("transformer_sana_wm_refiner", "SanaWMRefinerKVCache")(2)
    cache.sink_pe = turns(1, rows, 16, 16)
    for number in range(2):
        layer = cache.get(number)
        layer.store_sink(noise(2 + number, rows, 16, 32), noise(4 + number, rows, 16, 32))
        layer.store_history(noise(6 + number, rows, 16, 32), noise(8 + number, rows, 16, 32))
    return {
        "hidden_states": noise(10, rows, 32, 8),
        "encoder_hidden_states": noise(11, rows, 5, 20),
        "timestep": times(rows, 32),
        "video_rotary_emb": turns(12, rows, 32, 16),
        "encoder_attention_mask": mask(rows, 5),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
        "return_dict": False,
    }


def ace_step(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 12, 6),
        "timestep": times(rows, value=0.5),
        "timestep_r": times(rows, value=0.5),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "context_latents": noise(3, rows, 12, 12),
        "attention_kwargs": None,
        "return_dict": False,
    }


def stable_audio(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 6, 12),
        "timestep": times(1, value=0.5),
        "encoder_hidden_states": noise(2, rows, 5, 20),
        "global_hidden_states": noise(3, rows, 1, 28),
        "rotary_embedding": get_1d_rotary_pos_embed(
            8, 13, use_real=True, repeat_interleave_real=False
        ),
        "return_dict": False,
    }


def stable_audio_3(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 6, 12),
        "timestep": times(rows, value=0.5),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "global_hidden_states": noise(3, rows, 20),
        "encoder_attention_mask": mask(rows, 5),
        "local_add_cond": noise(4, rows, 7, 12),
        "return_dict": False,
    }


def longcat_audio(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 12, 6),
        "encoder_hidden_states": noise(2, rows, 5, 24),
        "encoder_attention_mask": mask(rows, 5, torch.bool),
        "timestep": times(rows, value=0.5),
        "attention_mask": torch.ones(rows, 12, dtype=torch.bool),
        "latent_cond": noise(3, rows, 12, 6),
    }


def minimax_music3(rows: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, rows, 6, 12),
        "timestep": times(rows, value=0.5),
        "return_dict": False,
        "encoder_hidden_states": noise(2, rows, 12, 20),
    }


def rfd4_proteina(rows: int) -> dict[str, Any]:
    # Eight residues in two molecules; the first residue is given, the last one is padding.
    real = torch.ones(rows, 8, dtype=torch.bool)
    real[0, -1] = False
    given = (torch.arange(8) == 0).expand(rows, -1)
    atoms = torch.ones(rows, 8, 37, dtype=torch.bool)
    atoms[0, 1, 2] = False
    molecules = (torch.arange(8) // 4).expand(rows, -1)
    steps_apart = (torch.arange(8)[:, None] - torch.arange(8)).abs().expand(rows, -1, -1)
    bonds = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord")
    return {
        "bb_ca": noise(1, rows, 8, 3),
        "local_latents": noise(2, rows, 8, 6),
        "bb_ca_time": times(rows, value=0.5),
        "local_latents_time": times(rows, value=0.25),
        "padding_mask": real,
        "token_type": (torch.arange(8) % 4).expand(rows, -1),
        "atom37_mask": atoms,
        "conditioning": {
            **{f"condition_{bond}_1_atom": atoms.cumsum(1) % 4 for bond in bonds},
            "condition_coordinate_1_atom": noise(3, rows, 8, 37, 3),
            "condition_secondary-structure_1_residue": (torch.arange(8) % 4).expand(rows, -1),
            "condition_index-group_1_token": molecules,
            "condition_cath-label_1_residue": torch.tensor([1, 10, 100]).expand(rows, 8, 3),
            "is_in_context_conditioning": given,
            "supports_local_latent": torch.ones(rows, 8, dtype=torch.bool),
            "molecule_iid": molecules,
            "molecule_entity_id": molecules,
            "token_bond_path_length": steps_apart,
            "bond_mask": steps_apart == 1,
            "bond_order": (steps_apart == 1).long(),
            "charge": torch.zeros(rows, 8, 37),
            "element": torch.full((rows, 8, 37), 6),
        },
        "recycle_depth": 2,
        "attention_kwargs": None,
    }


COGVIDEOX = {
    "attention_head_dim": 16,
    "time_embed_dim": 12,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 5,
    "use_rotary_positional_embeddings": True,
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 12,
    "ffn_dim": 40,
    "num_layers": 2,
}
WAN_IMAGE = {**WAN, "in_channels": 9, "image_dim": 20, "added_kv_proj_dim": 32}
HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 12,
    "rope_axes_dim": (4, 6, 6),
}
LTX2 = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 12,
    "audio_out_channels": 12,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 20,
}

CASES: dict[str, Case] = {
    "CogVideoXTransformer3DModel": Case(
        config={**COGVIDEOX, "num_attention_heads": 2, "in_channels": 4, "out_channels": 4},
        inputs=cogvideox,
    ),
    "ConsisIDTransformer3DModel": Case(
        config={
            **COGVIDEOX,
            "num_attention_heads": 3,
            "in_channels": 8,
            "out_channels": 4,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 28,
            "LFE_vit_dim": 20,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 3,
            "LFE_output_dim": 32,
            "LFE_ff_mult": 2,
        },
        inputs=consisid,
    ),
    "LatteTransformer3DModel": Case(
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 24,
            "video_length": 2,
        },
        inputs=latte,
    ),
    "AllegroTransformer3DModel": Case(
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
            "caption_channels": 20,
        },
        inputs=allegro,
    ),
    "AnyFlowTransformer3DModel": Case(config=WAN, inputs=anyflow),
    "AnyFlowFARTransformer3DModel": Case(
        config={**WAN, "chunk_partition": (1, 1, 1, 3)}, inputs=anyflow_far, trained=False
    ),
    "ChronoEditTransformer3DModel": Case(
        config=WAN_IMAGE,
        inputs=wan_image,
    ),
    "CosmosTransformer3DModel": Case(
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 24,
            "adaln_lora_dim": 8,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,  # that would need torchvision
        },
        inputs=cosmos,
    ),
    "Cosmos3OmniTransformer": Case(
        config={
            "head_dim": 16,
            "hidden_size": 48,
            "intermediate_size": 40,
            "latent_channel": 4,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "patch_latent_dim": 16,
            "sound_dim": 6,
            "sound_gen": True,
            "vocab_size": 50,
            "rope_axes_dim": (4, 2, 2),
        },
        inputs=cosmos3,
        rows=1,
    ),
    "EasyAnimateTransformer3DModel": Case(
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 3,
            "mmdit_layers": 2,
            "time_embed_dim": 12,
            "add_norm_text_encoder": True,
            "text_embed_dim": 24,
        },
        inputs=easyanimate,
    ),
    "HeliosTransformer3DModel": Case(config={**WAN, "rope_dim": (4, 6, 6)}, inputs=helios),
    "HunyuanVideoTransformer3DModel": Case(config=HUNYUAN_VIDEO, inputs=hunyuan_video),
    "HunyuanVideo15Transformer3DModel": Case(
        config={
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "text_embed_2_dim": 12,
            "image_embed_dim": 20,
            "rope_axes_dim": (4, 6, 6),
        },
        inputs=hunyuan_video15,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        config={
            **HUNYUAN_VIDEO,
            "has_image_proj": True,
            "image_proj_dim": 20,
            "has_clean_x_embedder": True,
        },
        inputs=hunyuan_framepack,
    ),
    "Kandinsky5Transformer3DModel": Case(
        config={
            "in_text_dim": 24,
            "in_text_dim2": 12,
            "time_dim": 20,
            "model_dim": 32,
            "ff_dim": 40,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": True,
        },
        inputs=kandinsky5,
    ),
    "Kandinsky6Transformer3DModel": Case(
        config={
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 24,
            "in_text_dim2": 12,
            "time_dim": 20,
            "model_dim": 32,
            "ff_dim": 40,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "in_audio_dim": 5,
            "out_audio_dim": 5,
            "model_dim_a": 24,
            "ff_dim_a": 36,
            "axes_dims_a": (4, 4, 4),
        },
        inputs=kandinsky6,
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        trained=False,
        config={
            "in_visual_dim": 4,
            "out_visual_dim": 8,
            "time_dim": 20,
            "model_dim": 32,
            "ff_dim": 40,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        inputs=kandinsky6_sr,
    ),
    "LTXVideoTransformer3DModel": Case(
        config={
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 20,
        },
        inputs=ltx,
    ),
    "MochiTransformer3DModel": Case(
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "pooled_projection_dim": 12,
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 20,
            "max_sequence_length": 5,
        },
        inputs=mochi,
    ),
    "LTX2VideoTransformer3DModel": Case(config=LTX2, inputs=ltx2),
    "MiniMaxH3Transformer3DModel": Case(
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 40,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 24,
            "freq_dim": 12,
            "time_embed_hidden_dim": 28,
            "time_embed_dim": 20,
            "rope_freq_dim": 2,
        },
        inputs=minimax_h3,
    ),
    "MotifVideoTransformer3DModel": Case(
        config={
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "text_embed_dim": 24,
            "image_embed_dim": 20,
            "rope_axes_dim": (4, 6, 6),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        inputs=motif_video,
    ),
    "SanaVideoTransformer3DModel": Case(
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
        },
        inputs=sana_video,
    ),
    "SanaWMTransformer3DModel": Case(
        config={
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 12,
            "image_size": 128,
            "caption_channels": 24,
        },
        inputs=sana_wm,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Case(config=LTX2, inputs=sana_wm_refiner),
    "SkyReelsV2Transformer3DModel": Case(config=WAN, inputs=skyreels),
    "WanTransformer3DModel": Case(config=WAN, inputs=wan),
    "WanAnimateTransformer3DModel": Case(
        config={
            **WAN_IMAGE,
            "in_channels": 12,
            "latent_channels": 4,
            "motion_encoder_channel_sizes": {"4": 8, "8": 12},
            "motion_encoder_size": 8,
            "motion_style_dim": 16,
            "motion_dim": 4,
            "motion_encoder_dim": 12,
            "face_encoder_hidden_dim": 20,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        inputs=wan_animate,
    ),
    "WanAnimate2Transformer3DModel": Case(
        config={
            "text_len": 6,
            "in_dim": 9,
            "dim": 32,
            "ffn_dim": 40,
            "freq_dim": 12,
            "text_dim": 24,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 2,
        },
        inputs=wan_animate_2,
    ),
    "WanVACETransformer3DModel": Case(
        config={**WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 12},
        inputs=wan_vace,
    ),
    "AceStepTransformer1DModel": Case(
        config={
            "hidden_size": 40,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 18,
            "audio_acoustic_hidden_dim": 6,
            "sliding_window": 2,
            "encoder_hidden_size": 24,
        },
        inputs=ace_step,
    ),
    "StableAudioDiTModel": Case(
        config={
            "sample_size": 12,
            "in_channels": 6,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": 6,
            "cross_attention_dim": 16,
            "time_proj_dim": 12,
            "global_states_input_dim": 28,
            "cross_attention_input_dim": 20,
        },
        inputs=stable_audio,
    ),
    "StableAudio3DiTModel": Case(
        config={
            "io_channels": 6,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 24,
            "global_cond_dim": 20,
            "local_add_cond_dim": 7,
            "timestep_features_dim": 12,
            "num_memory_tokens": 3,
        },
        inputs=stable_audio_3,
    ),
    "LongCatAudioDiTTransformer": Case(
        config={
            "dit_dim": 32,
            "dit_depth": 2,
            "dit_heads": 2,
            "dit_text_dim": 24,
            "latent_dim": 6,
        },
        inputs=longcat_audio,
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        config={
            "in_channels": 6,
            "condition_dim": 20,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 40,
            "rotary_dim": 8,
            "fourier_embedding_dim": 12,
        },
        inputs=minimax_music3,
    ),
    "MiniMaxMusic3RVQDepthDecoder": Case(
        reason="It is a language model of the codes of a frame of audio, not a denoiser."
    ),
    "RFD4ProteinaTransformer": Case(
        config={
            "nlayers": 3,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 20,
            "pair_repr_dim": 24,
            "latent_dim": 6,
            "token_type_emb_dim": 8,
            "cath_emb_dim": 4,
            "t_emb_dim": 12,
            "seq_sep_dim": 10,
            "xt_pair_dist_dim": 9,
            "tri_mult_c": 16,
            "num_sequence_classes": 30,
        },
        inputs=rfd4_proteina,
    ),
}
