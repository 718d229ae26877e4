"""Small pipelines that make images from text, from a class or from nothing."""

from typing import Any

from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    AuraFlowPipeline,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    CMStochasticIterativeScheduler,
    CogView4Pipeline,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HunyuanDiTPipeline,
    IFPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMPipeline,
    Lumina2Pipeline,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PNDMScheduler,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionGLIGENPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)

from . import text
from .case import PipelineCase
from .parts import SIDE, SIMPLE, STABLE, autoencoder, codebook, net, unet

STEPS: dict[str, Any] = {"num_inference_steps": 2}
SIZE: dict[str, Any] = {"height": SIDE, "width": SIDE}
WORDS: dict[str, Any] = {"prompt": text.PROMPT, **STEPS}
ASKED: dict[str, Any] = {**WORDS, **SIZE}
SHORT = {"max_sequence_length": text.LENGTH}
EIGHT: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4, 4, 8, 8),
}
"""What an autoencoder with 8 by 8 pixels for each latent has."""
UNSAFE: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def stable(**changes: Any) -> dict[str, Any]:
    """Return the components of Stable Diffusion."""
    components = {
        "vae": autoencoder(),
        "text_encoder": text.clip_text(),
        "tokenizer": text.clip_tokenizer(),
        "unet": unet(),
        "scheduler": PNDMScheduler(
            beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
    }
    return {**components, **UNSAFE, **changes}


def stable_xl(**changes: Any) -> dict[str, Any]:
    """Return the components of Stable Diffusion XL."""
    components = {
        "vae": autoencoder(),
        "text_encoder": text.clip_text(12),
        "text_encoder_2": text.clip_text_projected(12),
        "tokenizer": text.clip_tokenizer(),
        "tokenizer_2": text.clip_tokenizer(),
        "unet": net("UNet2DConditionModel"),
        "scheduler": EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    }
    return {**components, **changes}


def stable_3(**changes: Any) -> dict[str, Any]:
    """Return the components of Stable Diffusion 3."""
    components = {
        "transformer": net("SD3Transformer2DModel"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": autoencoder(shift_factor=0.1),
        "text_encoder": text.clip_text_projected(12, projection_dim=6),
        "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.clip_text_projected(12, projection_dim=6),
        "tokenizer_2": text.clip_tokenizer(),
        "text_encoder_3": text.t5_text(),
        "tokenizer_3": text.t5_tokenizer(),
    }
    return {**components, **changes}


def flux(**changes: Any) -> dict[str, Any]:
    """Return the components of Flux."""
    components = {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": autoencoder(shift_factor=0.1),
        "text_encoder": text.clip_text(12),
        "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.t5_text(),
        "tokenizer_2": text.t5_tokenizer(),
        "transformer": net("FluxTransformer2DModel"),
    }
    return {**components, **changes}


def deepfloyd(**changes: Any) -> dict[str, Any]:
    """Return the components of DeepFloyd IF, which works on pixels, with a changed UNet."""
    components = {
        "tokenizer": text.t5_tokenizer(77),
        "text_encoder": text.t5_text(20),
        "unet": unet(
            **{
                **SIMPLE,
                "in_channels": 3,
                "out_channels": 6,
                "encoder_hid_dim": 20,
                "encoder_hid_dim_type": "text_proj",
                "addition_embed_type": "text",
                "addition_embed_type_num_heads": 2,
                **changes,
            }
        ),
        "scheduler": DDPMScheduler(variance_type="learned_range", thresholding=True),
        "watermarker": None,
    }
    return {**components, **UNSAFE}


def deep_autoencoder() -> AutoencoderDC:
    """Return the autoencoder of Sana, with four by four pixels for each latent."""
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(4, 8, 8),
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (3,)),
        decoder_qkv_multiscales=((), (), (3,)),
    )


CASES: dict[str, PipelineCase] = {
    "DDPMPipeline": PipelineCase(
        "unconditional",
        lambda: DDPMPipeline(net("UNet2DModel"), DDPMScheduler()),
        lambda: {"batch_size": 2, **STEPS},
    ),
    "DDIMPipeline": PipelineCase(
        "unconditional",
        lambda: DDIMPipeline(net("UNet2DModel"), DDIMScheduler()),
        lambda: {"batch_size": 2, "eta": 0.5, **STEPS},
    ),
    "LDMPipeline": PipelineCase(
        "unconditional",
        lambda: LDMPipeline(
            codebook(latent_channels=3), net("UNet2DModel"), DDIMScheduler(**STABLE)
        ),
        lambda: {"batch_size": 2, **STEPS},
    ),
    "ConsistencyModelPipeline": PipelineCase(
        "class-conditional",
        lambda: ConsistencyModelPipeline(
            net("UNet2DModel", num_class_embeds=5), CMStochasticIterativeScheduler()
        ),
        lambda: {"class_labels": 3, **STEPS},
    ),
    "DiTPipeline": PipelineCase(
        "class-conditional",
        # The class that stands for none is always the one after a thousand.
        lambda: DiTPipeline(
            net("DiTTransformer2DModel", num_embeds_ada_norm=1000), autoencoder(), DDIMScheduler()
        ),
        lambda: {"class_labels": [3], **STEPS},
        ("transformer",),
    ),
    "StableDiffusionPipeline": PipelineCase(
        "text to image", lambda: StableDiffusionPipeline(**stable()), lambda: ASKED
    ),
    "StableDiffusionXLPipeline": PipelineCase(
        "text to image",
        lambda: StableDiffusionXLPipeline(**stable_xl(), add_watermarker=False),
        lambda: ASKED,
    ),
    "LatentConsistencyModelPipeline": PipelineCase(
        "text to image",
        lambda: LatentConsistencyModelPipeline(
            **stable(
                unet=unet(time_cond_proj_dim=8),
                scheduler=LCMScheduler(beta_schedule="scaled_linear", clip_sample=False),
            )
        ),
        lambda: ASKED,
    ),
    "StableDiffusionPAGPipeline": PipelineCase(
        "text to image",
        lambda: StableDiffusionPAGPipeline(**stable(), pag_applied_layers="mid"),
        lambda: {**ASKED, "pag_scale": 3.0},
    ),
    "StableDiffusionGLIGENPipeline": PipelineCase(
        "text and boxes to image",
        lambda: StableDiffusionGLIGENPipeline(
            **stable(unet=unet(attention_type="gated", transformer_layers_per_block=1))
        ),
        lambda: {
            **ASKED,
            "gligen_phrases": ["a cat"],
            "gligen_boxes": [[0.1, 0.2, 0.6, 0.9]],
            "gligen_scheduled_sampling_beta": 1.0,
        },
    ),
    "StableDiffusion3Pipeline": PipelineCase(
        "text to image",
        lambda: StableDiffusion3Pipeline(**stable_3()),
        lambda: {**ASKED, **SHORT},
        ("transformer",),
    ),
    "FluxPipeline": PipelineCase(
        "text to image",
        lambda: FluxPipeline(**flux()),
        lambda: {**ASKED, **SHORT},
        ("transformer",),
    ),
    "PixArtSigmaPipeline": PipelineCase(
        "text to image",
        lambda: PixArtSigmaPipeline(
            text.t5_tokenizer(),
            text.t5_text(16),
            autoencoder(),
            net("PixArtTransformer2DModel", use_additional_conditions=False),
            DDIMScheduler(**STABLE),
        ),
        lambda: {
            **ASKED,
            **SHORT,
            "clean_caption": False,
            "use_resolution_binning": False,
        },
        ("transformer",),
    ),
    "IFPipeline": PipelineCase(
        "text to image",
        lambda: IFPipeline(**deepfloyd()),
        lambda: {**ASKED, "clean_caption": False},
    ),
    "PixArtAlphaPipeline": PipelineCase(
        "text to image",
        lambda: PixArtAlphaPipeline(
            text.t5_tokenizer(),
            text.t5_text(16),
            autoencoder(),
            net("PixArtTransformer2DModel", use_additional_conditions=False),
            DPMSolverMultistepScheduler(),
        ),
        lambda: {**ASKED, **SHORT, "clean_caption": False, "use_resolution_binning": False},
        ("transformer",),
    ),
    "AuraFlowPipeline": PipelineCase(
        "text to image",
        lambda: AuraFlowPipeline(
            text.t5_tokenizer(),
            text.umt5_text(),
            autoencoder(),
            net("AuraFlowTransformer2DModel"),
            FlowMatchEulerDiscreteScheduler(),
        ),
        lambda: {**ASKED, **SHORT},
        ("transformer",),
    ),
    "ChromaPipeline": PipelineCase(
        "text to image",
        lambda: ChromaPipeline(
            FlowMatchEulerDiscreteScheduler(),
            autoencoder(shift_factor=0.1),
            text.t5_text(),
            text.t5_tokenizer(),
            net("ChromaTransformer2DModel"),
        ),
        lambda: {**ASKED, **SHORT, "negative_prompt": "a dog"},
        ("transformer",),
    ),
    "SanaPipeline": PipelineCase(
        "text to image",
        lambda: SanaPipeline(
            text.gemma_tokenizer(),
            text.gemma2_text(),
            deep_autoencoder(),
            net("SanaTransformer2DModel"),
            FlowMatchEulerDiscreteScheduler(shift=3.0),
        ),
        lambda: {
            **WORDS,
            **SHORT,
            "height": 32,  # it takes multiples of this
            "width": 32,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
        ("transformer",),
    ),
    "HunyuanDiTPipeline": PipelineCase(
        "text to image",
        # It takes it for granted that a latent has 8 by 8 pixels.
        lambda: HunyuanDiTPipeline(
            vae=autoencoder(**EIGHT),
            text_encoder=text.bert_text(),
            tokenizer=text.bert_tokenizer(77),
            transformer=net("HunyuanDiT2DModel", text_len=77, text_len_t5=256),
            scheduler=DDPMScheduler(),
            text_encoder_2=text.t5_text(32),
            tokenizer_2=text.t5_tokenizer(256),
            **UNSAFE,
        ),
        lambda: {**WORDS, "height": 64, "width": 64, "use_resolution_binning": False},
        ("transformer",),
    ),
    "LuminaPipeline": PipelineCase(
        "text to image",
        # It too gives each latent 8 by 8 pixels; the autoencoder makes 2 by 2 of them.
        lambda: LuminaPipeline(
            net("LuminaNextDiT2DModel"),
            FlowMatchEulerDiscreteScheduler(),
            autoencoder(),
            text.gemma_text(),
            text.gemma_tokenizer(),
        ),
        lambda: {**WORDS, **SHORT, "height": 64, "width": 64, "clean_caption": False},
        ("transformer",),
    ),
    "Lumina2Pipeline": PipelineCase(
        "text to image",
        lambda: Lumina2Pipeline(
            net("Lumina2Transformer2DModel", axes_lens=(128, 8, 8)),
            FlowMatchEulerDiscreteScheduler(),
            autoencoder(shift_factor=0.1),
            text.gemma2_text(),
            text.gemma_tokenizer(),
        ),
        lambda: {
            **WORDS,
            "height": 64,
            "width": 64,
            "system_prompt": "draw",
            "max_sequence_length": 64,
        },
        ("transformer",),
    ),
    "CogView4Pipeline": PipelineCase(
        "text to image",
        lambda: CogView4Pipeline(
            text.qwen_tokenizer(),
            text.glm_text(),
            autoencoder(),
            net("CogView4Transformer2DModel"),
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25),
        ),
        lambda: {**ASKED, **SHORT, "negative_prompt": "a dog"},
        ("transformer",),
    ),
    "QwenImagePipeline": PipelineCase(
        "text to image",
        lambda: QwenImagePipeline(
            FlowMatchEulerDiscreteScheduler(),
            AutoencoderKLQwenImage(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 2],
                num_res_blocks=1,
                temperal_downsample=[True],
                latents_mean=[0.0] * 4,
                latents_std=[1.0] * 4,
            ),
            text.qwen_vision_text(),
            text.qwen_tokenizer(),
            net("QwenImageTransformer2DModel"),
        ),
        lambda: {**ASKED, "negative_prompt": "a dog"},
        ("transformer",),
    ),
    "ZImagePipeline": PipelineCase(
        "text to image",
        lambda: ZImagePipeline(
            FlowMatchEulerDiscreteScheduler(),
            autoencoder(shift_factor=0.1),
            text.qwen3_text(),
            text.qwen_tokenizer(),
            net("ZImageTransformer2DModel"),
        ),
        lambda: {**ASKED, **SHORT},
        ("transformer",),
    ),
    "AmusedPipeline": PipelineCase(
        "text to image",
        # It predicts entries of a codebook, and the last of its vocabulary is one to predict.
        lambda: AmusedPipeline(
            codebook(lookup_from_codebook=True),
            text.clip_tokenizer(),
            text.clip_text_projected(projection_dim=12),
            net("UVit2DModel"),
            AmusedScheduler(mask_token_id=19),
        ),
        lambda: ASKED,
        ("transformer",),
    ),
}
