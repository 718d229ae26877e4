"""Tiny denoisers of every family, with random weights, and arguments to call them with."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from msfp import QuantizationConfig, pack, quantize
from msfp.pipelines.denoiser import denoiser_of

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
        num_embeds_ada_norm=1000,
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
SOME = [
    name if name in ("unet", "conditional_unet", "dit", "flux")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES
]  # fmt: skip
"""Parameters of tests that others repeat for every family."""
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


def call(denoiser, timestep=500):
    """The prediction of a denoiser of any family for one fixed call, in its dtype."""
    dtype = denoiser.dtype

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


def quantized(denoiser, **config):
    """The denoiser, quantized in place and packed; to nearest, where nothing else is given."""
    quantize(denoiser, QuantizationConfig(**{"refine": None} | config), calibration=call)
    pack(denoiser)
    return denoiser


def cast(module, dtype):
    """The module cast in place as diffusers' loader does: buffers that are not saved stay."""
    saved = set(module.state_dict())
    stay = {name: buffer for name, buffer in module.named_buffers() if name not in saved}
    module.to(dtype)
    for name, buffer in stay.items():
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent)._buffers[leaf] = buffer
    return module


def autoencoder(channels):
    return AutoencoderKL(
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        shift_factor=0.0,
    ).eval()


def clip(folder):
    """A text encoder of random weights, and a tokenizer of one letter."""
    folder.mkdir(exist_ok=True)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=5
    )
    config = CLIPTextConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=5, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}


def safety_checker():
    """A checker of random weights to which every image is unsafe, and what reads images for it."""
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    # Cosines with the embeddings of concepts, which always exceed this.
    checker.concept_embeds_weights.data.fill_(-2.0)
    size = {"height": 8, "width": 8}
    extractor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size)
    return {"safety_checker": checker.eval(), "feature_extractor": extractor}


def pipeline(family, folder):
    """The pipeline of a family's denoiser; a folder is needed to write a vocabulary to."""
    denoiser = make(family)
    torch.manual_seed(0)
    no_text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    flow = FlowMatchEulerDiscreteScheduler()
    ddim = DDIMScheduler(clip_sample=False, steps_offset=1)
    makers = {
        "unet": lambda: DDIMPipeline(denoiser, ddim),
        "conditional_unet": lambda: StableDiffusionPipeline(
            unet=denoiser, vae=autoencoder(4), scheduler=ddim, **clip(folder),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ),
        "xl_unet": lambda: StableDiffusionXLPipeline(
            unet=denoiser, vae=autoencoder(4), scheduler=ddim, **no_text, add_watermarker=False
        ),
        "dit": lambda: DiTPipeline(denoiser, autoencoder(4), ddim),
        "pixart": lambda: PixArtAlphaPipeline(
            transformer=denoiser, vae=autoencoder(4), scheduler=ddim,
            text_encoder=None, tokenizer=None,
        ),
        "sd3": lambda: StableDiffusion3Pipeline(
            transformer=denoiser, vae=autoencoder(4), scheduler=flow, **no_text,
            text_encoder_3=None, tokenizer_3=None,
        ),
        "flux": lambda: FluxPipeline(
            transformer=denoiser, vae=autoencoder(4), scheduler=flow, **no_text
        ),
    }  # fmt: skip
    pipe = makers[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(folder, **arguments):
    """Load a pipeline with nothing but diffusers; components that are None must be passed."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe):
    """The images of one fixed call of two steps, float32.

    The prediction instead, where the pipeline cannot make images in bfloat16 at all.
    """
    if type(pipe) in (DDIMPipeline, DiTPipeline) and pipe.dtype == torch.bfloat16:
        return call(denoiser_of(pipe))
    draw = torch.Generator().manual_seed(0)
    dtype = denoiser_of(pipe).dtype

    def noise(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    embeds = {"prompt_embeds": noise(1, 5, 8), "negative_prompt_embeds": -noise(1, 5, 8)}
    pooled = {
        "pooled_prompt_embeds": noise(1, 8),
        "negative_pooled_prompt_embeds": -noise(1, 8),
    }
    size = {"height": 16, "width": 16}
    arguments = {
        DDIMPipeline: {"batch_size": 2},
        StableDiffusionPipeline: {"prompt": "a", **size},
        StableDiffusionXLPipeline: {**embeds, **pooled, **size},
        DiTPipeline: {"class_labels": [1, 2]},
        PixArtAlphaPipeline: {
            **embeds, **size, "negative_prompt": None, "use_resolution_binning": False,
            "prompt_attention_mask": torch.ones(1, 5),
            "negative_prompt_attention_mask": torch.ones(1, 5),
        },
        StableDiffusion3Pipeline: {**embeds, **pooled, **size},
        FluxPipeline: {
            "prompt_embeds": noise(1, 5, 8), "pooled_prompt_embeds": noise(1, 8), **size
        },
    }[type(pipe)]  # fmt: skip
    output = pipe(**arguments, generator=draw, num_inference_steps=2, output_type="np")
    return torch.from_numpy(output.images)
