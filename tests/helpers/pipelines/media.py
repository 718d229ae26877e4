"""Small pipelines that make video or audio."""

from typing import Any

from denoisers import noise
from diffusers import (
    AllegroPipeline,
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AudioLDMPipeline,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    DanceDiffusionPipeline,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    I2VGenXLPipeline,
    IPNDMScheduler,
    LattePipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    MochiPipeline,
    MotionAdapter,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
)
from transformers import ClapFeatureExtractor

from . import text
from .case import PipelineCase
from .images import ASKED, SHORT, SIZE, STEPS, WORDS, stable
from .parts import STABLE, autoencoder, net, picture, unet

FRAMES = 3
"""Frames of a video, of two latent frames where an autoencoder compresses time."""
FILMED = {**ASKED, "num_frames": FRAMES}
WANTED = {**ASKED, "num_frames": 5}
SMALL = {"height": 32, "width": 32}
EMBEDDED = {
    "prompt_embeds": noise(95, 1, 512, 24),
    "negative_prompt_embeds": noise(96, 1, 512, 24),
}
"""A prompt for Wan, whose transformers take the last 512 tokens for text if there is an image.

To clean a text it needs a package, ftfy, that is not always there.
"""
LEVELS: dict[str, Any] = {
    "block_out_channels": (4, 4, 8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
"""What an autoencoder with 8 by 8 pixels for each latent, and one frame of four, has."""


def animated() -> dict[str, Any]:
    """Return the components of AnimateDiff, whose UNet gets motion modules."""
    components = stable(
        unet=unet(transformer_layers_per_block=1), scheduler=DDIMScheduler(**STABLE)
    )
    for name in ("safety_checker", "requires_safety_checker"):
        del components[name]
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
    )
    return {**components, "motion_adapter": adapter}


def cogvideox(channels: int) -> dict[str, Any]:
    """Return the components of CogVideoX, whose transformer takes some channels."""
    return {
        "tokenizer": text.t5_tokenizer(),
        "text_encoder": text.t5_text(),
        "vae": AutoencoderKLCogVideoX(latent_channels=4, **LEVELS),
        "transformer": net(
            "CogVideoXTransformer3DModel", in_channels=channels, max_text_seq_length=text.LENGTH
        ),
        "scheduler": CogVideoXDDIMScheduler(),
    }


def ltx() -> dict[str, Any]:
    """Return the components of LTX, with 8 by 8 pixels of two frames for each latent."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, False),
            decoder_spatio_temporal_scaling=(True, False),
            decoder_inject_noise=(False, False, False),
            downsample_type=("conv", "conv"),
            upsample_residual=(False, False),
            upsample_factor=(1, 1),
        ),
        "text_encoder": text.t5_text(20),
        "tokenizer": text.t5_tokenizer(),
        "transformer": net("LTXVideoTransformer3DModel"),
    }


def wan(**changes: Any) -> dict[str, Any]:
    """Return the components of Wan, with 4 by 4 pixels of four frames for each latent."""
    components = {
        "tokenizer": text.t5_tokenizer(),
        "text_encoder": text.umt5_text(),
        "vae": AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
        "transformer": net("WanTransformer3DModel"),
    }
    return {**components, **changes}


VIDEO: dict[str, PipelineCase] = {
    "AnimateDiffPipeline": PipelineCase(
        "video", lambda: AnimateDiffPipeline(**animated()), lambda: FILMED
    ),
    "TextToVideoSDPipeline": PipelineCase(
        "video",
        lambda: TextToVideoSDPipeline(
            autoencoder(),
            text.clip_text(),
            text.clip_tokenizer(),
            net("UNet3DConditionModel"),
            DDIMScheduler(**STABLE),
        ),
        lambda: FILMED,
    ),
    "CogVideoXPipeline": PipelineCase(
        "video",
        lambda: CogVideoXPipeline(**cogvideox(4)),
        lambda: {**WORDS, **SMALL, **SHORT, "num_frames": 5},
        ("transformer",),
    ),
    "LTXPipeline": PipelineCase(
        "video",
        lambda: LTXPipeline(**ltx()),
        lambda: {**WORDS, **SMALL, **SHORT, "num_frames": FRAMES},
        ("transformer",),
    ),
    "WanPipeline": PipelineCase(
        "video",
        lambda: WanPipeline(**wan()),
        lambda: {**WANTED, **SHORT},
        ("transformer",),
    ),
    "WanPipeline, two experts": PipelineCase(
        "video, two experts",
        # One of three steps is before the boundary, and two are after it.
        lambda: WanPipeline(
            **wan(), transformer_2=net("WanTransformer3DModel"), boundary_ratio=0.6
        ),
        lambda: {**WANTED, **SHORT, "num_inference_steps": 3, "guidance_scale_2": 3.0},
        ("transformer", "transformer_2"),
    ),
    "HunyuanVideoPipeline": PipelineCase(
        "video",
        lambda: HunyuanVideoPipeline(
            text.llama_text(),
            text.llama_tokenizer(),
            net("HunyuanVideoTransformer3DModel", guidance_embeds=True),
            AutoencoderKLHunyuanVideo(latent_channels=4, **LEVELS),
            FlowMatchEulerDiscreteScheduler(),
            text.clip_text(12),
            text.clip_tokenizer(),
        ),
        lambda: {
            **WORDS,
            **SMALL,
            "num_frames": 5,
            "prompt_template": {"template": "film: {}", "crop_start": 6},
            "max_sequence_length": 32,
        },
        ("transformer",),
    ),
    "MochiPipeline": PipelineCase(
        "video",
        # Its normalizations always have 32 groups, and its latents 12 channels.
        lambda: MochiPipeline(
            FlowMatchEulerDiscreteScheduler(),
            AutoencoderKLMochi(
                encoder_block_out_channels=(32, 32, 32, 32),
                decoder_block_out_channels=(32, 32, 32, 32),
                layers_per_block=(1, 1, 1, 1, 1),
            ),
            text.t5_text(),
            text.t5_tokenizer(),
            net("MochiTransformer3DModel", in_channels=12, max_sequence_length=text.LENGTH),
        ),
        lambda: {**WORDS, **SMALL, **SHORT, "num_frames": 7},
        ("transformer",),
    ),
    "AllegroPipeline": PipelineCase(
        "video",
        # Its autoencoder decodes in tiles alone, and does not save that they are on.
        lambda: AllegroPipeline(
            text.t5_tokenizer(),
            text.t5_text(20),
            AutoencoderKLAllegro(**LEVELS),
            net("AllegroTransformer3DModel"),
            DDIMScheduler(**STABLE),
        ),
        lambda: {
            **WORDS,
            **SMALL,
            **SHORT,
            "num_frames": 5,
            "clean_caption": False,
            "output_type": "latent",
        },
        ("transformer",),
    ),
    "LattePipeline": PipelineCase(
        "video",
        lambda: LattePipeline(
            text.t5_tokenizer(120),
            text.t5_text(),
            autoencoder(),
            net("LatteTransformer3DModel"),
            DDIMScheduler(**STABLE),
        ),
        lambda: {**ASKED, "video_length": 2, "clean_caption": False},
        ("transformer",),
    ),
}

FROM_IMAGES: dict[str, PipelineCase] = {
    "AnimateDiffVideoToVideoPipeline": PipelineCase(
        "video to video",
        lambda: AnimateDiffVideoToVideoPipeline(**animated()),
        lambda: {
            **ASKED,
            "video": [picture(seed) for seed in range(FRAMES)],
            "strength": 0.5,
            "num_inference_steps": 4,
        },
    ),
    "StableVideoDiffusionPipeline": PipelineCase(
        "image to video",
        lambda: StableVideoDiffusionPipeline(
            AutoencoderKLTemporalDecoder(
                down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32)
            ),
            # It resizes what its encoder of images gets to this.
            text.clip_vision_projected(image_size=224, patch_size=56),
            net("UNetSpatioTemporalConditionModel"),
            EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
            text.clip_images(),
        ),
        lambda: {"image": picture(), "num_frames": FRAMES, **SIZE, **STEPS},
    ),
    "I2VGenXLPipeline": PipelineCase(
        "image to video",
        lambda: I2VGenXLPipeline(
            autoencoder(),
            text.clip_text(),
            text.clip_tokenizer(),
            text.clip_vision_projected(),
            text.clip_images(),
            net("I2VGenXLUNet"),
            DDIMScheduler(**STABLE),
        ),
        # Transformers 5 has no longer what the pipeline skips a layer with, which it does else.
        lambda: {**FILMED, "image": picture(), "clip_skip": None},
    ),
    "CogVideoXImageToVideoPipeline": PipelineCase(
        "image to video",
        lambda: CogVideoXImageToVideoPipeline(**cogvideox(8)),
        lambda: {**WORDS, **SMALL, **SHORT, "num_frames": 5, "image": picture(side=32)},
        ("transformer",),
    ),
    "LTXImageToVideoPipeline": PipelineCase(
        "image to video",
        lambda: LTXImageToVideoPipeline(**ltx()),
        lambda: {**WORDS, **SMALL, **SHORT, "num_frames": FRAMES, "image": picture(side=32)},
        ("transformer",),
    ),
    "WanImageToVideoPipeline": PipelineCase(
        "image to video",
        # The noise and the image have four channels each, and the mask one for each of four frames.
        lambda: WanImageToVideoPipeline(
            **wan(
                transformer=net(
                    "WanTransformer3DModel", in_channels=12, image_dim=20, added_kv_proj_dim=32
                )
            ),
            image_processor=text.clip_images(),
            image_encoder=text.clip_vision(20),
        ),
        lambda: {**EMBEDDED, "image": picture(), **SIZE, **STEPS, "num_frames": 5},
        ("transformer",),
    ),
    "WanImageToVideoPipeline, two experts": PipelineCase(
        "image to video, two experts",
        # Of this version the transformers see the image in their channels alone.
        lambda: WanImageToVideoPipeline(
            **wan(transformer=net("WanTransformer3DModel", in_channels=12)),
            transformer_2=net("WanTransformer3DModel", in_channels=12),
            boundary_ratio=0.6,
        ),
        lambda: {
            **EMBEDDED,
            "image": picture(),
            **SIZE,
            "num_frames": 5,
            "num_inference_steps": 3,
        },
        ("transformer", "transformer_2"),
    ),
}

AUDIO: dict[str, PipelineCase] = {
    "AudioLDMPipeline": PipelineCase(
        "audio",
        # Its condition is the embedding of a whole text, beside that of the time.
        lambda: AudioLDMPipeline(
            autoencoder(in_channels=1, out_channels=1),
            text.clap_text_projected(),
            text.roberta_tokenizer(),
            unet(
                class_embed_type="simple_projection",
                projection_class_embeddings_input_dim=24,
                class_embeddings_concat=True,
                cross_attention_dim=(16, 32),
            ),
            DDIMScheduler(**STABLE),
            text.vocoder(),
        ),
        lambda: {**WORDS, "audio_length_in_s": 0.004},
    ),
    "AudioLDM2Pipeline": PipelineCase(
        "audio",
        lambda: AudioLDM2Pipeline(
            autoencoder(in_channels=1, out_channels=1),
            text.clap(),
            text.t5_text(20),
            AudioLDM2ProjectionModel(24, 20, 24),
            text.gpt2(),
            text.roberta_tokenizer(),
            text.t5_tokenizer(),
            ClapFeatureExtractor(feature_size=16),
            AudioLDM2UNet2DConditionModel(
                sample_size=8,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                attention_head_dim=(2, 4),
                cross_attention_dim=((None, 24, 20), (None, 24, 20)),
            ),
            DDIMScheduler(**STABLE),
            text.vocoder(),
        ),
        lambda: {**WORDS, "audio_length_in_s": 0.004, "max_new_tokens": 4},
    ),
    "DanceDiffusionPipeline": PipelineCase(
        "audio",
        lambda: DanceDiffusionPipeline(net("UNet1DModel", sample_rate=16000), IPNDMScheduler()),
        lambda: {"batch_size": 2, **STEPS},
    ),
    "StableAudioPipeline": PipelineCase(
        "audio",
        # A latent is four samples, and a second has sixteen.
        lambda: StableAudioPipeline(
            AutoencoderOobleck(
                encoder_hidden_size=4,
                downsampling_ratios=[2, 2],
                channel_multiples=[1, 2],
                decoder_channels=4,
                decoder_input_channels=6,
                sampling_rate=16,
            ),
            text.t5_text(20),
            StableAudioProjectionModel(20, 20, 0, 32),
            text.t5_tokenizer(),
            net("StableAudioDiTModel", global_states_input_dim=40),
            EDMDPMSolverMultistepScheduler(),
        ),
        lambda: {**WORDS, "audio_end_in_s": 2.0},
        ("transformer",),
    ),
}

CASES: dict[str, PipelineCase] = VIDEO | FROM_IMAGES | AUDIO
