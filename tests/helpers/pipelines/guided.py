"""Small pipelines that are given an image, a mask or a control, or that run one after another."""

from typing import Any

import torch
from denoisers import noise
from diffusers import (
    ControlNetXSAdapter,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EulerDiscreteScheduler,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    IFSuperResolutionPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    LDMSuperResolutionPipeline,
    MarigoldDepthPipeline,
    StableCascadeCombinedPipeline,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    T2IAdapter,
    UnCLIPPipeline,
    UnCLIPScheduler,
    VQModel,
    WuerstchenCombinedPipeline,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.deprecated.wuerstchen import (
    PaellaVQModel,
    WuerstchenDiffNeXt,
    WuerstchenPrior,
)

from . import text
from .case import PipelineCase, fill
from .images import (
    ASKED,
    SHORT,
    SIZE,
    STEPS,
    UNSAFE,
    WORDS,
    deepfloyd,
    flux,
    stable,
    stable_3,
    stable_xl,
)
from .parts import SIDE, SIMPLE, STABLE, autoencoder, codebook, left, net, picture, unet

PART = {"strength": 0.5, "num_inference_steps": 4}
"""A call that leaves some of the given image, and denoises in two steps."""


def control(name: str = "ControlNetModel", **changes: Any) -> Any:
    """Return a control network whose outputs are not zero."""
    module = net(name, **changes)
    fill(module, std=0.3)
    return module


def with_control_xs() -> StableDiffusionControlNetXSPipeline:
    """Return Stable Diffusion whose UNet becomes one network with its control."""
    plain = unet(layers_per_block=2, transformer_layers_per_block=1)
    adapter = ControlNetXSAdapter.from_unet(
        plain, size_ratio=0.5, conditioning_embedding_out_channels=(4, 8)
    )
    return StableDiffusionControlNetXSPipeline(**stable(unet=plain), controlnet=adapter)


def with_ip_adapter() -> StableDiffusionPipeline:
    """Return Stable Diffusion whose UNet also attends to four tokens of an image."""
    pipe = StableDiffusionPipeline(**stable())
    cross = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    layers: dict[str, torch.Tensor] = {}
    for number, name in enumerate(cross):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for place, key in enumerate(("to_k_ip", "to_v_ip")):
            # Numbers are odd in files, because attentions of an image with itself are numbered too.
            layers[f"{2 * number + 1}.{key}.weight"] = 0.3 * noise(number, 2, width, 24)[place]
    projection = {
        "proj.weight": 0.3 * noise(90, 4 * 24, 20),
        "proj.bias": torch.zeros(4 * 24),
        "norm.weight": torch.ones(24),
        "norm.bias": torch.zeros(24),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return pipe


def movq() -> VQModel:
    """Return the autoencoder of Kandinsky."""
    return codebook(norm_type="spatial", block_out_channels=(32, 32))  # its groups are 32


def kandinsky() -> dict[str, Any]:
    """Return the components of Kandinsky 2.2 that make an image of an embedding."""
    return {
        "unet": unet(
            **SIMPLE,
            out_channels=8,
            addition_embed_type="image",
            encoder_hid_dim=24,
            encoder_hid_dim_type="image_proj",
        ),
        "scheduler": DDPMScheduler(variance_type="learned_range", clip_sample=False),
        "movq": movq(),
    }


def kandinsky_prior() -> dict[str, Any]:
    """Return the components of Kandinsky 2.2 that make an embedding of a text."""
    return {
        "prior": net("PriorTransformer", num_embeddings=text.LENGTH),
        "image_encoder": text.clip_vision_projected(),
        "text_encoder": text.clip_text_projected(),
        "tokenizer": text.clip_tokenizer(),
        "scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        "image_processor": text.clip_images(),
    }


def vqgan() -> PaellaVQModel:
    """Return the autoencoder of Stable Cascade, with four pixels for each latent."""
    return PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=18, scale_factor=0.004)


def cascade_prior() -> dict[str, Any]:
    """Return the components of Stable Cascade that make a small latent of a text."""
    return {
        "tokenizer": text.clip_tokenizer(),
        "text_encoder": text.clip_text_projected(20, projection_dim=12),
        "prior": net("StableCascadeUNet"),
        "scheduler": DDPMWuerstchenScheduler(),
    }


def cascade_decoder() -> dict[str, Any]:
    """Return the components of Stable Cascade that make an image of a small latent."""
    return {
        "decoder": net(
            "StableCascadeUNet",
            patch_size=2,
            effnet_in_channels=4,
            clip_text_in_channels=None,
            clip_image_in_channels=None,
            timestep_conditioning_type=("sca",),
        ),
        "tokenizer": text.clip_tokenizer(),
        "text_encoder": text.clip_text_projected(20, projection_dim=12),
        "scheduler": DDPMWuerstchenScheduler(),
        "vqgan": vqgan(),
    }


def wuerstchen() -> dict[str, Any]:
    """Return the components of the decoder of Würstchen."""
    return {
        "tokenizer": text.clip_tokenizer(),
        "text_encoder": text.clip_text(),
        "decoder": WuerstchenDiffNeXt(
            c_r=8,
            c_cond=24,
            c_hidden=[16, 32],
            nhead=[-1, 4],
            blocks=[1, 2],
            level_config=["CT", "CTA"],
            inject_effnet=[False, True],
            effnet_embd=4,
            clip_embd=24,
        ),
        "scheduler": DDPMWuerstchenScheduler(),
        "vqgan": vqgan(),
    }


def wuerstchen_prior() -> dict[str, Any]:
    """Return the components of the prior of Würstchen."""
    prior = WuerstchenPrior(c_in=4, c=16, c_cond=24, c_r=8, depth=2, nhead=2)
    with torch.no_grad():
        prior.out[1].weight.mul_(0.1)  # it divides by one minus half of this output
    return {
        "tokenizer": text.clip_tokenizer(),
        "text_encoder": text.clip_text(),
        "prior": prior,
        "scheduler": DDPMWuerstchenScheduler(),
    }


def unclip() -> dict[str, Any]:
    """Return the components of unCLIP: a prior, a decoder and two UNets that upscale."""
    return {
        "prior": net("PriorTransformer", num_embeddings=text.LENGTH),
        "decoder": unet(in_channels=3, out_channels=6, class_embed_type="identity", **SIMPLE),
        "text_encoder": text.clip_text_projected(),
        "tokenizer": text.clip_tokenizer(),
        "text_proj": UnCLIPTextProjModel(
            clip_embeddings_dim=24, time_embed_dim=64, cross_attention_dim=24
        ),
        "super_res_first": net("UNet2DModel", in_channels=6, sample_size=SIDE),
        "super_res_last": net("UNet2DModel", in_channels=6, sample_size=SIDE),
        "prior_scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log"),
    }


def prefixed(components: dict[str, Any]) -> dict[str, Any]:
    """Return the components of a prior under their names in a combined pipeline."""
    return {"prior_" + name: component for name, component in components.items()}


IMAGE_TO_IMAGE: dict[str, PipelineCase] = {
    "StableDiffusionImg2ImgPipeline": PipelineCase(
        "image to image",
        lambda: StableDiffusionImg2ImgPipeline(**stable(scheduler=DDIMScheduler(**STABLE))),
        lambda: {**WORDS, "image": picture(), **PART},
    ),
    "StableDiffusionXLImg2ImgPipeline": PipelineCase(
        "image to image",
        lambda: StableDiffusionXLImg2ImgPipeline(**stable_xl(), add_watermarker=False),
        lambda: {**WORDS, "image": picture(), **PART},
    ),
    "StableDiffusion3Img2ImgPipeline": PipelineCase(
        "image to image",
        lambda: StableDiffusion3Img2ImgPipeline(**stable_3()),
        lambda: {**ASKED, "image": picture(), **PART, **SHORT},
        ("transformer",),
    ),
    "FluxImg2ImgPipeline": PipelineCase(
        "image to image",
        lambda: FluxImg2ImgPipeline(**flux()),
        lambda: {**ASKED, "image": picture(), **PART, **SHORT},
        ("transformer",),
    ),
    "StableDiffusionInstructPix2PixPipeline": PipelineCase(
        "edit",
        lambda: StableDiffusionInstructPix2PixPipeline(
            **stable(unet=unet(in_channels=8), scheduler=DDIMScheduler(**STABLE))
        ),
        lambda: {**WORDS, "image": picture(), "image_guidance_scale": 1.5},
    ),
    "StableDiffusionDepth2ImgPipeline": PipelineCase(
        "image to image",
        # Its UNet sees a map of depths beside the latents.
        lambda: StableDiffusionDepth2ImgPipeline(
            autoencoder(),
            text.clip_text(),
            text.clip_tokenizer(),
            unet(in_channels=5),
            DDIMScheduler(**STABLE),
            text.depth_estimator(),
            text.depth_images(),
        ),
        lambda: {**WORDS, "image": picture(), **PART},
    ),
    "MarigoldDepthPipeline": PipelineCase(
        "image to depth",
        lambda: MarigoldDepthPipeline(
            unet(in_channels=8),
            autoencoder(),
            DDIMScheduler(**STABLE, prediction_type="v_prediction"),
            text.clip_text(),
            text.clip_tokenizer(),
            prediction_type="depth",
            default_denoising_steps=2,
            default_processing_resolution=SIDE,
        ),
        lambda: {"image": picture(), **STEPS},
    ),
    "FluxControlPipeline": PipelineCase(
        "image to image",
        lambda: FluxControlPipeline(
            **flux(transformer=net("FluxTransformer2DModel", in_channels=32, out_channels=16))
        ),
        lambda: {**ASKED, "control_image": picture(), **SHORT},
        ("transformer",),
    ),
    "FluxKontextPipeline": PipelineCase(
        "edit",
        lambda: FluxKontextPipeline(**flux()),
        lambda: {
            **ASKED,
            "image": picture(),
            "max_area": SIDE * SIDE,
            "_auto_resize": False,
            **SHORT,
        },
        ("transformer",),
    ),
    "StableDiffusionImageVariationPipeline": PipelineCase(
        "image variation",
        lambda: StableDiffusionImageVariationPipeline(
            autoencoder(),
            text.clip_vision_projected(),
            unet(),
            DDIMScheduler(**STABLE),
            **{**UNSAFE, "feature_extractor": text.clip_images()},
        ),
        lambda: {"image": picture(), **SIZE, **STEPS},
    ),
    "StableDiffusionInpaintPipeline": PipelineCase(
        "inpainting",
        lambda: StableDiffusionInpaintPipeline(
            **stable(unet=unet(in_channels=9), scheduler=DDIMScheduler(**STABLE))
        ),
        lambda: {**ASKED, "image": picture(), "mask_image": left()},
    ),
    "StableDiffusionInpaintPipeline, four channels": PipelineCase(
        "inpainting",
        lambda: StableDiffusionInpaintPipeline(**stable(scheduler=DDIMScheduler(**STABLE))),
        lambda: {**ASKED, "image": picture(), "mask_image": left(), **PART},
    ),
    "StableDiffusionXLInpaintPipeline": PipelineCase(
        "inpainting",
        lambda: StableDiffusionXLInpaintPipeline(**stable_xl(), add_watermarker=False),
        lambda: {**ASKED, "image": picture(), "mask_image": left(), **PART},
    ),
    "FluxInpaintPipeline": PipelineCase(
        "inpainting",
        lambda: FluxInpaintPipeline(**flux()),
        lambda: {**ASKED, "image": picture(), "mask_image": left(), **PART, **SHORT},
        ("transformer",),
    ),
    "FluxFillPipeline": PipelineCase(
        "inpainting",
        # Latents and the given image have 16 channels each in a patch, and so has the mask.
        lambda: FluxFillPipeline(
            **flux(transformer=net("FluxTransformer2DModel", in_channels=48, out_channels=16))
        ),
        lambda: {**ASKED, "image": picture(), "mask_image": left(), **SHORT},
        ("transformer",),
    ),
}

CONTROLLED: dict[str, PipelineCase] = {
    "StableDiffusionControlNetPipeline": PipelineCase(
        "ControlNet",
        lambda: StableDiffusionControlNetPipeline(**stable(), controlnet=control()),
        lambda: {**ASKED, "image": picture()},
    ),
    "StableDiffusionControlNetPipeline, two": PipelineCase(
        "ControlNet",
        lambda: StableDiffusionControlNetPipeline(**stable(), controlnet=[control(), control()]),
        lambda: {
            **ASKED,
            "image": [picture(), picture(2)],
            "controlnet_conditioning_scale": [0.8, 0.5],
        },
    ),
    "StableDiffusionControlNetImg2ImgPipeline": PipelineCase(
        "ControlNet",
        lambda: StableDiffusionControlNetImg2ImgPipeline(
            **stable(scheduler=DDIMScheduler(**STABLE)), controlnet=control()
        ),
        lambda: {**ASKED, "image": picture(), "control_image": picture(2), **PART},
    ),
    "StableDiffusionControlNetInpaintPipeline": PipelineCase(
        "ControlNet",
        lambda: StableDiffusionControlNetInpaintPipeline(
            **stable(scheduler=DDIMScheduler(**STABLE)), controlnet=control()
        ),
        lambda: {
            **ASKED,
            "image": picture(),
            "mask_image": left(),
            "control_image": picture(2),
            **PART,
        },
    ),
    "StableDiffusionXLControlNetPipeline": PipelineCase(
        "ControlNet",
        lambda: StableDiffusionXLControlNetPipeline(
            **stable_xl(),
            controlnet=control(
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=12 + 6 * 8,
                transformer_layers_per_block=(1, 2),
            ),
            add_watermarker=False,
        ),
        lambda: {**ASKED, "image": picture()},
    ),
    "StableDiffusionControlNetXSPipeline": PipelineCase(
        "ControlNet",
        with_control_xs,
        lambda: {**ASKED, "image": picture()},
        saved=False,  # the groups of some normalizations change
    ),
    "StableDiffusion3ControlNetPipeline": PipelineCase(
        "ControlNet",
        lambda: StableDiffusion3ControlNetPipeline(
            **stable_3(),
            controlnet=control(
                "SD3ControlNetModel", attention_head_dim=8, caption_projection_dim=16
            ),
        ),
        lambda: {**ASKED, "control_image": picture(), **SHORT},
        ("transformer",),
    ),
    "FluxControlNetPipeline": PipelineCase(
        "ControlNet",
        lambda: FluxControlNetPipeline(
            **flux(), controlnet=control("FluxControlNetModel", num_mode=None)
        ),
        lambda: {**ASKED, "control_image": picture(), **SHORT},
        ("transformer",),
    ),
    "StableDiffusionAdapterPipeline": PipelineCase(
        "T2I adapter",
        lambda: StableDiffusionAdapterPipeline(
            **stable(),
            adapter=T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2),
        ),
        lambda: {**ASKED, "image": picture()},
    ),
    "StableDiffusionPipeline, IP-Adapter": PipelineCase(
        "IP-Adapter",
        with_ip_adapter,
        # Without an image, and with it: one image each.
        lambda: {**ASKED, "ip_adapter_image_embeds": [noise(91, 2, 1, 20)]},
        saved=False,  # without the adapter
    ),
}

UPSCALERS: dict[str, PipelineCase] = {
    "LDMSuperResolutionPipeline": PipelineCase(
        "upscaler",
        lambda: LDMSuperResolutionPipeline(
            codebook(latent_channels=3), net("UNet2DModel", in_channels=6), DDIMScheduler(**STABLE)
        ),
        lambda: {"image": picture(side=32), **STEPS},  # it takes multiples of 32
    ),
    "StableDiffusionUpscalePipeline": PipelineCase(
        "upscaler",
        lambda: StableDiffusionUpscalePipeline(
            autoencoder(),
            text.clip_text(),
            text.clip_tokenizer(),
            unet(in_channels=7, num_class_embeds=1000),
            DDPMScheduler(),
            DDIMScheduler(**STABLE),
        ),
        lambda: {**WORDS, "image": picture(side=SIDE // 2)},
    ),
    "StableDiffusionLatentUpscalePipeline": PipelineCase(
        "upscaler",
        lambda: StableDiffusionLatentUpscalePipeline(
            autoencoder(),
            text.clip_text(),
            text.clip_tokenizer(),
            unet(in_channels=8, out_channels=5, time_cond_proj_dim=128 + 24),
            EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="sample"),
        ),
        lambda: {**WORDS, "image": picture()},
    ),
    "IFSuperResolutionPipeline": PipelineCase(
        "upscaler",
        lambda: IFSuperResolutionPipeline(
            **deepfloyd(in_channels=6, class_embed_type="timestep"),
            image_noising_scheduler=DDPMScheduler(),
        ),
        lambda: {**ASKED, "image": picture(side=SIDE // 2), "clean_caption": False},
    ),
}

CASCADES: dict[str, PipelineCase] = {
    "KandinskyV22PriorPipeline": PipelineCase(
        "text to embedding",
        lambda: KandinskyV22PriorPipeline(**kandinsky_prior()),
        lambda: WORDS,
        ("prior",),
    ),
    "KandinskyV22Pipeline": PipelineCase(
        "embedding to image",
        lambda: KandinskyV22Pipeline(**kandinsky()),
        lambda: {
            "image_embeds": noise(92, 1, 24),
            "negative_image_embeds": noise(93, 1, 24),
            **SIZE,
            **STEPS,
        },
    ),
    "KandinskyV22CombinedPipeline": PipelineCase(
        "cascade",
        lambda: KandinskyV22CombinedPipeline(**kandinsky(), **prefixed(kandinsky_prior())),
        lambda: {**ASKED, "prior_num_inference_steps": 2},
        ("prior_prior", "unet"),
    ),
    "StableCascadePriorPipeline": PipelineCase(
        "text to embedding",
        lambda: StableCascadePriorPipeline(**cascade_prior()),
        lambda: {**WORDS, "height": 128, "width": 128},
        ("prior",),
    ),
    "StableCascadeDecoderPipeline": PipelineCase(
        "embedding to image",
        lambda: StableCascadeDecoderPipeline(**cascade_decoder(), latent_dim_scale=4.0),
        lambda: {**WORDS, "image_embeddings": noise(94, 1, 4, 4, 4), "guidance_scale": 2.0},
        ("decoder",),
        saved=False,  # PaellaVQModel is not found
    ),
    "StableCascadeCombinedPipeline": PipelineCase(
        "cascade",
        lambda: StableCascadeCombinedPipeline(**cascade_decoder(), **prefixed(cascade_prior())),
        lambda: {**WORDS, "height": 128, "width": 128, "prior_num_inference_steps": 2},
        ("prior_prior", "decoder"),
        saved=False,  # PaellaVQModel is not found
    ),
    "WuerstchenCombinedPipeline": PipelineCase(
        "cascade",
        lambda: WuerstchenCombinedPipeline(**wuerstchen(), **prefixed(wuerstchen_prior())),
        lambda: {**WORDS, "height": 128, "width": 128, "prior_num_inference_steps": 2},
        ("prior_prior", "decoder"),
        saved=False,  # no model of it is found
    ),
    "UnCLIPPipeline": PipelineCase(
        "cascade",
        lambda: UnCLIPPipeline(**unclip()),
        lambda: {
            "prompt": text.PROMPT,
            "prior_num_inference_steps": 2,
            "decoder_num_inference_steps": 2,
            "super_res_num_inference_steps": 3,
        },
        ("prior", "decoder", "super_res_first", "super_res_last"),
        saved=False,  # UnCLIPTextProjModel is not found
    ),
}

CASES: dict[str, PipelineCase] = IMAGE_TO_IMAGE | CONTROLLED | UPSCALERS | CASCADES
