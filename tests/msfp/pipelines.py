"""Tiny pipelines of every family around the denoisers of `families`, and calls of them."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from families import make

STEPS = 3


def ddim():
    return DDIMScheduler(clip_sample=False, steps_offset=1)


def embeddings(*shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(len(shape)))


def stable_diffusion(family, cls, **components):
    return cls(
        vae=None, text_encoder=None, tokenizer=None, unet=make(family), scheduler=ddim(),
        **components,
    )  # fmt: skip


def sd():
    others = {"safety_checker": None, "feature_extractor": None}
    return stable_diffusion(
        "conditional_unet", StableDiffusionPipeline, requires_safety_checker=False, **others
    )


def sdxl():
    return stable_diffusion(
        "xl_unet", StableDiffusionXLPipeline, text_encoder_2=None, tokenizer_2=None
    )


def dit():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    # The class that stands for none is number 1000.
    config = {**make("dit").config, "num_embeds_ada_norm": 1000}
    return DiTPipeline(DiTTransformer2DModel.from_config(config).eval(), vae, ddim())


def pixart():
    return PixArtAlphaPipeline(None, None, None, make("pixart"), ddim())


def sd3():
    flow = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(make("sd3"), flow, None, None, None, None, None, None, None)


def flux():
    flow = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(flow, None, None, None, None, None, make("flux"))


def unconditional():
    return DDIMPipeline(make("unet"), ddim())


BUILDERS = {
    "unet": unconditional,
    "conditional_unet": sd,
    "xl_unet": sdxl,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
}
PROMPT = {"prompt_embeds": embeddings(5, 8), "negative_prompt_embeds": embeddings(5, 8) / 2}
POOLED = {"pooled_prompt_embeds": embeddings(8)}
BOTH_POOLED = POOLED | {"negative_pooled_prompt_embeds": embeddings(8) / 2}
MASKS = {
    "prompt_attention_mask": torch.ones(1, 5),
    "negative_prompt_attention_mask": torch.ones(1, 5),
}
SMALL = {"height": 64, "width": 64, "output_type": "latent"}
ARGUMENTS = {
    "unet": {"batch_size": 2, "output_type": "np"},
    "conditional_unet": SMALL | PROMPT,
    "xl_unet": SMALL | PROMPT | BOTH_POOLED,
    "dit": {"class_labels": [3], "output_type": "np"},
    "pixart": SMALL | PROMPT | MASKS | {"negative_prompt": None, "use_resolution_binning": False},
    "sd3": SMALL | PROMPT | BOTH_POOLED,
    "flux": SMALL | POOLED | {"prompt_embeds": embeddings(5, 8)},
}
GUIDED = set(BUILDERS) - {"unet", "flux"}
"""Families whose calls batch both branches of classifier-free guidance."""


def build(family):
    """A family's pipeline, without progress bars."""
    pipe = BUILDERS[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, family, seed=0):
    """The output of a call of a family's pipeline."""
    generator = torch.Generator().manual_seed(seed)
    output = pipe(**ARGUMENTS[family], num_inference_steps=STEPS, generator=generator)
    return torch.as_tensor(output.images)


def component(pipe):
    """What the pipeline calls its denoiser."""
    return "unet" if "unet" in pipe.components else "transformer"


def text_encoder(transformers, folder):
    """A tokenizer of letters and a tiny text encoder, as components of a pipeline."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": transformers.CLIPTextModel(config).eval()}
