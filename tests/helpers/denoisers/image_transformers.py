"""Small configurations of the transformers that denoise images, and arguments of their calls."""

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import nn

from .case import Case, noise, the

SIDE = 8
PATCHES = SIDE // 2
TOKENS = PATCHES * PATCHES
WORDS = 5

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
WIDE_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
STREAMS = {"num_layers": 1, "num_single_layers": 1}
COGVIEW = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 2,
    "out_channels": 4,
    "text_embed_dim": 24,
    "time_embed_dim": 12,
    "condition_dim": 8,
    "pos_embed_max_size": SIDE,
    "sample_size": SIDE,
}
JOY_IMAGE = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 24,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


class Uninitialised(Case):
    """A small denoiser whose class leaves some of its weights as the memory they are made in."""

    def make(self, name: str) -> nn.Module:
        """Return the denoiser of random weights, in evaluation; none of its weights is zero."""
        denoiser = super().make(name)
        with torch.no_grad():
            for key, parameter in denoiser.named_parameters():
                if ".experts." in key or key == "pad_token":
                    parameter.normal_(std=0.1)
        return denoiser


def image(rows: int, channels: int = 4) -> torch.Tensor:
    """Return noisy latents as an image."""
    return noise(0, rows, channels, SIDE, SIDE)


def packed(rows: int, channels: int = 16) -> torch.Tensor:
    """Return noisy latents as a sequence of patches."""
    return noise(0, rows, TOKENS, channels)


def text(rows: int, features: int = 24, words: int = WORDS) -> torch.Tensor:
    """Return embeddings of the words of prompts."""
    return noise(1, rows, words, features)


def mask(rows: int, words: int = WORDS, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Return a mask that leaves out the last word of the first row."""
    kept = torch.ones(rows, words, dtype=dtype)
    kept[0, -1] = 0
    return kept


def same(rows: int, value: float) -> torch.Tensor:
    """Return one number for every row: a timestep, or a scale of the guidance."""
    return torch.full((rows,), value)


def sizes(rows: int, *values: float) -> torch.Tensor:
    """Return a size or a position in pixels for every row."""
    return torch.tensor([values]).repeat(rows, 1)


def grid(height: int = PATCHES, width: int = PATCHES, first: float = 0.0) -> torch.Tensor:
    """Return positions (first, row, column) of the patches of an image."""
    return torch.cartesian_prod(
        torch.tensor([first]), torch.arange(height).float(), torch.arange(width).float()
    )


def grid_of_four(height: int = PATCHES, width: int = PATCHES, first: int = 0) -> torch.Tensor:
    """Return positions (first, row, column, 0) of the patches of an image."""
    return torch.cartesian_prod(
        torch.tensor([first]), torch.arange(height), torch.arange(width), torch.arange(1)
    )


def words_of_four() -> torch.Tensor:
    """Return positions (0, 0, 0, index) of the words of a prompt."""
    return nn.functional.pad(torch.arange(WORDS)[:, None], (3, 0))


def diagonal() -> torch.Tensor:
    """Return positions (0, index, index) of the words of a prompt."""
    index = torch.arange(WORDS).float()
    return torch.stack([torch.zeros(WORDS), index, index], dim=1)


def bria_fibo(rows: int) -> dict[str, Any]:
    """Return the arguments of BriaFiboTransformer2DModel."""
    kept = torch.cat([mask(rows), torch.ones(rows, TOKENS, dtype=torch.long)], dim=1).bool()
    return {
        "hidden_states": packed(rows),
        "timestep": same(rows, 500.0),
        "encoder_hidden_states": text(rows),
        "text_encoder_layers": [noise(2, rows, WORDS, 12), noise(3, rows, WORDS, 12)],
        "joint_attention_kwargs": {"attention_mask": kept[:, None, None, :]},
        "return_dict": False,
        "txt_ids": torch.zeros(WORDS, 3),
        "img_ids": grid(),
    }


def cogview(rows: int) -> dict[str, Any]:
    """Return the arguments of CogView3PlusTransformer2DModel, without a timestep."""
    return {
        "hidden_states": image(rows),
        "encoder_hidden_states": text(rows),
        "original_size": sizes(rows, 64.0, 64.0),
        "target_size": sizes(rows, 64.0, 64.0),
        "crop_coords": sizes(rows, 0.0, 0.0),
        "return_dict": False,
    }


def ideogram4(rows: int) -> dict[str, Any]:
    """Return the arguments of Ideogram4Transformer2DModel: padding, words and patches in a row."""
    lengths = [WORDS - 1, WORDS][:rows]
    positions = torch.zeros(rows, WORDS + TOKENS, 3, dtype=torch.long)
    segments = torch.full((rows, WORDS + TOKENS), -1)
    indicator = torch.zeros(rows, WORDS + TOKENS, dtype=torch.long)
    for row, length in enumerate(lengths):
        start = WORDS - length
        positions[row, start:WORDS] = torch.arange(length)[:, None]
        positions[row, WORDS:] = grid().long() + 65536
        segments[row, start:] = 1
        indicator[row, start:WORDS] = 3
        indicator[row, WORDS:] = 2
    return {
        "hidden_states": torch.cat([torch.zeros(rows, WORDS, 16), packed(rows)], dim=1),
        "timestep": same(rows, 0.5),
        "encoder_hidden_states": text(rows, 24, WORDS + TOKENS),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": indicator,
        "attention_kwargs": None,
        "return_dict": False,
    }


def omnigen(rows: int) -> dict[str, Any]:
    """Return the arguments of OmniGenTransformer2DModel, each row with an image in its prompt."""
    prompt, end = 7, 7 + 1 + TOKENS
    seen = torch.ones(end, end).tril()
    seen[2:6, 2:6] = 1.0
    seen[-TOKENS:] = 1.0
    return {
        "hidden_states": image(rows),
        "timestep": same(rows, 0.5),
        "input_ids": torch.arange(1, prompt + 1).repeat(rows, 1),
        "input_img_latents": list(noise(2, rows, 1, 4, 4, 4)),
        "input_image_sizes": {row: [[2, 6]] for row in range(rows)},
        "attention_mask": seen.repeat(rows, 1, 1),
        "position_ids": torch.arange(end).repeat(rows, 1),
        "return_dict": False,
    }


CASES: dict[str, Case] = {
    "AuraFlowTransformer2DModel": Case(
        config={
            **HEADS,
            "sample_size": SIDE,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 24,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 64,
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "encoder_hidden_states": text(rows),
            "timestep": same(rows, 0.5),
            "return_dict": False,
            "attention_kwargs": None,
        },
    ),
    "DiTTransformer2DModel": Case(
        config={
            **HEADS,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": SIDE,
            "num_embeds_ada_norm": 10,
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "timestep": torch.full((rows,), 500),
            "class_labels": torch.arange(rows) + 1,
        },
    ),
    "HunyuanDiT2DModel": Case(
        config={
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": SIDE,
            "hidden_size": 16,
            "num_layers": 4,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 12,
            "text_len": 4,
            "text_len_t5": WORDS,
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "timestep": same(rows, 500.0),
            "encoder_hidden_states": text(rows, 24, 4),
            "text_embedding_mask": mask(rows, 4),
            "encoder_hidden_states_t5": noise(2, rows, WORDS, 32),
            "text_embedding_mask_t5": mask(rows),
            "image_meta_size": sizes(rows, 64.0, 64.0, 64.0, 64.0, 0.0, 0.0),
            "style": torch.zeros(rows, dtype=torch.long),
            "image_rotary_emb": get_2d_rotary_pos_embed(
                8, ((0, 0), (PATCHES, PATCHES)), (PATCHES, PATCHES), output_type="pt"
            ),
            "return_dict": False,
        },
    ),
    "LuminaNextDiT2DModel": Uninitialised(
        config={
            "sample_size": SIDE,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "cross_attention_dim": 24,
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "timestep": same(rows, 0.5),
            "encoder_hidden_states": text(rows),
            "encoder_mask": mask(rows),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, SIDE, SIDE),
            "cross_attention_kwargs": {"base_sequence_length": 64},
            "return_dict": False,
        },
    ),
    "PixArtTransformer2DModel": Case(
        config={
            "num_attention_heads": 3,
            "attention_head_dim": 8,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_size": SIDE,
            "use_additional_conditions": True,
            "caption_channels": 16,
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "encoder_hidden_states": text(rows, 16),
            "encoder_attention_mask": mask(rows),
            "timestep": torch.full((rows,), 500),
            "added_cond_kwargs": {
                "resolution": sizes(rows, 64.0, 64.0),
                "aspect_ratio": sizes(rows, 1.0),
            },
            "return_dict": False,
        },
    ),
    "SanaTransformer2DModel": Case(
        config={
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 1,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 16,
            "caption_channels": 24,
            "sample_size": SIDE,
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "encoder_hidden_states": text(rows),
            "encoder_attention_mask": mask(rows),
            "timestep": same(rows, 500.0),
            "return_dict": False,
            "attention_kwargs": None,
        },
    ),
    "DreamLiteTransformer2DModel": Case(
        config={
            **WIDE_HEADS,
            "in_channels": 16,
            "num_layers": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 24,
        },
        inputs=lambda rows: {
            "hidden_states": image(rows, 16),
            "encoder_hidden_states": text(rows),
            "cross_attention_kwargs": None,
            "attention_mask": None,
            "encoder_attention_mask": None,
            "return_dict": False,
        },
    ),
    "BriaTransformer2DModel": Case(
        config={
            **WIDE_HEADS,
            **STREAMS,
            "in_channels": 16,
            "joint_attention_dim": 24,
            "axes_dims_rope": [4, 6, 6],
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "timestep": same(rows, 500.0),
            "encoder_hidden_states": text(rows),
            "attention_kwargs": None,
            "return_dict": False,
            "txt_ids": torch.zeros(WORDS, 3),
            "img_ids": grid(),
        },
    ),
    "BriaFiboTransformer2DModel": Case(
        config={
            **WIDE_HEADS,
            **STREAMS,
            "in_channels": 16,
            "joint_attention_dim": 24,
            "axes_dims_rope": [4, 6, 6],
            "text_encoder_dim": 12,
        },
        inputs=bria_fibo,
    ),
    "BriaFibo2Transformer2DModel": Case(
        config={
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 24,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 2,
            "max_num_gist_tokens": 4,
            "gist_step": 1,
            "gist_min_text_len": 2,
            "gist_max_text_len": 8,
            "axes_dims": (4, 6, 6),
            "axes_lens": (16, 8, 8),
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "timestep": same(rows, 0.5),
            "encoder_hidden_states": noise(1, rows, 2, WORDS, 24),
            "encoder_attention_mask": mask(rows, dtype=torch.bool),
            "context_latents": None,
            "return_dict": False,
        },
    ),
    "ChromaTransformer2DModel": Case(
        config={
            **WIDE_HEADS,
            **STREAMS,
            "in_channels": 16,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 24,
            "approximator_layers": 2,
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "timestep": same(rows, 0.5),
            "encoder_hidden_states": text(rows),
            "txt_ids": torch.zeros(WORDS, 3),
            "img_ids": grid(),
            "attention_mask": torch.cat(
                [mask(rows, dtype=torch.float), torch.ones(rows, TOKENS)], dim=1
            ),
            "joint_attention_kwargs": {},
            "return_dict": False,
        },
    ),
    "CogView3PlusTransformer2DModel": Case(
        config=COGVIEW,
        inputs=lambda rows: {**cogview(rows), "timestep": torch.full((rows,), 500)},
    ),
    "CogView4Transformer2DModel": Case(
        config={**COGVIEW, "rope_axes_dim": (SIDE, SIDE)},
        inputs=lambda rows: {
            **cogview(rows),
            "timestep": same(rows, 500.0),
            "attention_kwargs": None,
        },
    ),
    "ErnieImageTransformer2DModel": Case(
        config={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        inputs=lambda rows: {
            "hidden_states": image(rows)[..., :PATCHES, :PATCHES],
            "timestep": same(rows, 500.0),
            "text_bth": text(rows) * mask(rows)[..., None],
            "text_lens": mask(rows).sum(dim=1),
            "return_dict": False,
        },
    ),
    "FluxTransformer2DModel": Case(
        config={
            **WIDE_HEADS,
            **STREAMS,
            "in_channels": 16,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 12,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "timestep": same(rows, 0.5),
            "guidance": same(rows, 3.5),
            "pooled_projections": noise(2, rows, 12),
            "encoder_hidden_states": text(rows),
            "txt_ids": torch.zeros(WORDS, 3),
            "img_ids": grid(),
            "joint_attention_kwargs": {},
            "return_dict": False,
        },
    ),
    "Flux2Transformer2DModel": Case(
        config={
            **WIDE_HEADS,
            **STREAMS,
            "in_channels": 16,
            "joint_attention_dim": 24,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "timestep": same(rows, 0.5),
            "guidance": same(rows, 4.0),
            "encoder_hidden_states": text(rows),
            "txt_ids": words_of_four().repeat(rows, 1, 1),
            "img_ids": grid_of_four().repeat(rows, 1, 1),
            "joint_attention_kwargs": None,
            "return_dict": False,
        },
    ),
    "Flux3Transformer2DModel": Case(
        config={
            **WIDE_HEADS,
            **STREAMS,
            "in_channels": 16,
            "cond_in_channels": 12,
            "joint_attention_dim": 24,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "timestep": same(rows, 0.5),
            "return_dict": False,
            "img_ids": grid_of_four(),
            "image_cond_hidden_states": noise(2, rows, 8, 12),
            "image_cond_ids": grid_of_four(2, 4, first=10),
            "encoder_hidden_states": text(rows),
            "txt_ids": words_of_four(),
        },
    ),
    "GlmImageTransformer2DModel": Case(
        config={
            **HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "out_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 12,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 32,
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "encoder_hidden_states": text(rows),
            "prior_token_id": torch.arange(rows * TOKENS).view(rows, TOKENS) % 32,
            "prior_token_drop": torch.zeros(rows, TOKENS, dtype=torch.bool),
            "timestep": same(rows, 499.0),
            "target_size": sizes(rows, 64.0, 64.0),
            "crop_coords": sizes(rows, 0.0, 0.0),
            "attention_kwargs": None,
            "return_dict": False,
            "kv_caches": the("transformer_glm_image", "GlmImageKVCache")(2),
        },
    ),
    "HiDreamImageTransformer2DModel": Case(
        config={
            **HEADS,
            **STREAMS,
            "patch_size": 2,
            "in_channels": 4,
            "caption_channels": [24, 20],
            "text_emb_dim": 12,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (SIDE, SIDE),
            "llama_layers": [0, 2],
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "timesteps": same(rows, 500.0),
            "encoder_hidden_states_t5": text(rows),
            "encoder_hidden_states_llama3": noise(2, rows, 3, WORDS, 20).transpose(0, 1),
            "pooled_embeds": noise(3, rows, 12),
            "attention_kwargs": None,
            "return_dict": False,
        },
    ),
    "HunyuanImageTransformer2DModel": Case(
        config={
            **WIDE_HEADS,
            **STREAMS,
            "in_channels": 4,
            "out_channels": 4,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "rope_axes_dim": (8, 8),
        },
        inputs=lambda rows: {
            "hidden_states": image(rows)[..., :PATCHES, :PATCHES],
            "timestep": same(rows, 500.0),
            "timestep_r": None,
            "guidance": None,
            "attention_kwargs": None,
            "return_dict": False,
            "encoder_hidden_states": text(rows),
            "encoder_attention_mask": mask(rows),
        },
    ),
    "Ideogram4Transformer2DModel": Case(
        config={
            **WIDE_HEADS,
            "in_channels": 16,
            "num_layers": 2,
            "intermediate_size": 48,
            "adaln_dim": 12,
            "llm_features_dim": 24,
            "mrope_section": (4, 2, 2),
        },
        inputs=ideogram4,
    ),
    "JoyImageEditTransformer3DModel": Case(
        config=JOY_IMAGE,
        inputs=lambda rows: {
            "hidden_states": noise(0, rows, 2, 4, 1, SIDE, SIDE),
            "timestep": same(rows, 500.0),
            "encoder_hidden_states": text(rows),
            "return_dict": False,
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Case(
        config=JOY_IMAGE,
        inputs=lambda rows: {
            "hidden_states": noise(0, rows, TOKENS + 8, 4, 1, 2, 2),
            "timestep": same(rows, 500.0),
            "encoder_hidden_states": text(rows),
            "encoder_hidden_states_mask": mask(rows),
            "shape_list": [[(1, PATCHES, PATCHES), (1, 2, 4)] for _ in range(rows)],
            "return_dict": False,
        },
    ),
    "Krea2Transformer2DModel": Case(
        config={
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "timestep_embed_dim": 12,
            "text_hidden_dim": 24,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 40,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "encoder_hidden_states": noise(1, rows, WORDS, 3, 24),
            "timestep": same(rows, 0.5),
            "position_ids": torch.cat([torch.zeros(WORDS, 3), grid()]),
            "encoder_attention_mask": mask(rows, dtype=torch.bool),
            "attention_kwargs": None,
            "return_dict": False,
        },
    ),
    "LongCatImageTransformer2DModel": Case(
        config={
            **WIDE_HEADS,
            **STREAMS,
            "in_channels": 16,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 24,
            "axes_dims_rope": [4, 6, 6],
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "timestep": same(rows, 0.5),
            "guidance": None,
            "encoder_hidden_states": text(rows),
            "txt_ids": diagonal(),
            "img_ids": grid(first=1.0),
            "return_dict": False,
        },
    ),
    "Lumina2Transformer2DModel": Case(
        config={
            "sample_size": SIDE,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (16, SIDE, SIDE),
            "cap_feat_dim": 24,
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "timestep": same(rows, 0.5),
            "encoder_hidden_states": text(rows),
            "encoder_attention_mask": mask(rows),
            "return_dict": False,
            "attention_kwargs": None,
        },
    ),
    "NucleusMoEImageTransformer2DModel": Uninitialised(
        config={
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 4, 4),
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 20,
            "capacity_factors": 2.0,
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "timestep": same(rows, 0.5),
            "encoder_hidden_states": text(rows),
            "encoder_hidden_states_mask": mask(rows),
            "img_shapes": [(1, PATCHES, PATCHES)] * rows,
            "attention_kwargs": {},
            "return_dict": False,
        },
    ),
    "OmniGenTransformer2DModel": Case(
        config={
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 16,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "pos_embed_max_size": SIDE,
            "time_step_dim": 24,
        },
        inputs=omnigen,
    ),
    "OvisImageTransformer2DModel": Case(
        config={
            **WIDE_HEADS,
            **STREAMS,
            "in_channels": 16,
            "out_channels": 16,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "timestep": same(rows, 0.5),
            "encoder_hidden_states": text(rows),
            "txt_ids": diagonal(),
            "img_ids": grid(),
            "joint_attention_kwargs": {},
            "return_dict": False,
        },
    ),
    "PRXTransformer2DModel": Case(
        config={
            "in_channels": 4,
            "context_in_dim": 24,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "timestep": same(rows, 0.5),
            "encoder_hidden_states": text(rows),
            "attention_mask": mask(rows, dtype=torch.bool),
            "return_dict": False,
        },
    ),
    "QwenImageTransformer2DModel": Case(
        config={
            **WIDE_HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "timestep": same(rows, 0.5),
            "guidance": None,
            "encoder_hidden_states_mask": mask(rows),
            "encoder_hidden_states": text(rows),
            "img_shapes": [[(1, PATCHES, PATCHES)]] * rows,
            "attention_kwargs": {},
            "return_dict": False,
        },
    ),
    "QwenImage21Transformer2DModel": Case(
        config={
            **WIDE_HEADS,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "context_in_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        inputs=lambda rows: {
            "hidden_states": packed(rows),
            "timestep": same(rows, 0.5),
            "encoder_hidden_states": text(rows),
            "encoder_hidden_states_mask": mask(rows),
            "img_shapes": [[(1, PATCHES, PATCHES)]] * rows,
            "img_mask": torch.tensor([[False] * WORDS + [True] * (TOKENS // 4)] * rows),
            "attention_kwargs": None,
            "kv_cache": the("transformer_qwenimage21", "QwenImage21KVCache")(2),
            "kv_cache_mode": "extract",
            "return_dict": False,
        },
    ),
    "SD3Transformer2DModel": Case(
        config={
            **HEADS,
            "sample_size": SIDE,
            "in_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 24,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 12,
            "out_channels": 4,
            "pos_embed_max_size": SIDE,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        inputs=lambda rows: {
            "hidden_states": image(rows),
            "timestep": same(rows, 500.0),
            "encoder_hidden_states": text(rows),
            "pooled_projections": noise(2, rows, 12),
            "joint_attention_kwargs": None,
            "return_dict": False,
        },
    ),
    "ZImageTransformer2DModel": Case(
        config={
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, SIDE, SIDE],
        },
        inputs=lambda rows: {
            "x": list(noise(0, rows, 4, 1, SIDE, SIDE)),
            "t": same(rows, 0.5),
            "cap_feats": [each[: WORDS - row] for row, each in enumerate(text(rows))],
            "joint_attention_kwargs": None,
            "return_dict": False,
        },
    ),
}
