import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from families import call, images, make, pipeline
from torch import nn

from msfp import InputError, QuantizationConfig, quantize, record_trajectories
from msfp.layers.lora.routers import LearnedRouter, router_for
from msfp.layers.lora.time_embedding import time_conditioning, time_scale
from msfp.pipelines.denoiser import denoiser_of
from msfp.ptq.low_rank_branches import add_branches

OWN = {
    "unet": "time_embedding",
    "conditional_unet": "time_embedding",
    "xl_unet": "time_embedding",  # and not that of the sizes of images
    "dit": "transformer_blocks.0.norm1.emb.timestep_embedder",
    "pixart": "adaln_single.emb.timestep_embedder",
    "sd3": "time_text_embed.timestep_embedder",
    "flux": "time_text_embed.timestep_embedder",
}


@pytest.mark.parametrize("family", OWN)
def test_it_is_what_the_denoiser_makes_of_the_timestep(family):
    denoiser = make(family)
    made = []
    hook = denoiser.get_submodule(OWN[family]).register_forward_hook(
        lambda _module, _args, embedding: made.append(embedding[:1])
    )
    call(denoiser, 250)
    hook.remove()
    width = made[0].shape[-1]
    expected = nn.functional.layer_norm(made[0], (width,))
    embedding = time_conditioning(denoiser)(torch.tensor([250.0]))
    assert torch.allclose(embedding, expected, atol=1e-5)


def test_that_of_an_open_denoiser_is_plain_and_frozen_and_float32():
    denoiser = make("unet")
    times = torch.tensor([3, 700])
    expected = time_conditioning(denoiser)(times)
    quantize(denoiser, QuantizationConfig(refine=None), calibration=call)
    conditioning = time_conditioning(denoiser)
    assert torch.equal(conditioning(times), expected)
    linear = [module for module in conditioning.modules() if isinstance(module, nn.Linear)]
    assert {type(layer) for layer in linear} == {nn.Linear}
    narrow = time_conditioning(denoiser.bfloat16()).parameters()
    assert {(p.dtype, p.requires_grad) for p in narrow} == {(torch.float32, False)}


def test_that_of_an_open_denoiser_has_the_branches_of_its_layers():
    torch.manual_seed(0)
    denoiser = UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
    ).eval()  # fmt: skip
    times = torch.tensor([3, 700])
    expected = time_conditioning(denoiser)(times)
    quantize(denoiser, QuantizationConfig(refine=None), calibration=call)
    add_branches(denoiser, 8)
    assert torch.allclose(time_conditioning(denoiser)(times), expected, atol=1e-4)


def test_of_several_it_is_the_one_that_is_least_deep():
    class Part(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.proj = Timesteps(8, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.embedder = TimestepEmbedding(8, width)

    denoiser = nn.ModuleDict({"text": nn.ModuleDict({"refiner": Part(4)}), "time": Part(16)})
    assert time_conditioning(denoiser).width == 16


@pytest.mark.parametrize(("family", "scale"), [("unet", 1.0), ("dit", 1.0), ("flux", 1000.0)])
def test_the_scale_of_timesteps_is_what_the_denoiser_makes_of_them(family, scale, tmp_path):
    pipe = pipeline(family, tmp_path)
    path = record_trajectories(pipe, images)
    assert time_scale(denoiser_of(pipe), path) == scale


def test_times_that_are_not_embedded_are_refused(tmp_path):
    pipe = pipeline("unet", tmp_path)
    path = record_trajectories(pipe, images)
    spare = nn.Module()
    spare.time_proj, spare.time_embedding = make("unet").time_proj, make("unet").time_embedding
    spare.forward = denoiser_of(pipe).forward
    with pytest.raises(InputError, match="Module has no embedding of the timestep"):
        time_scale(spare, path)
    at_zero = replace(path, timesteps=torch.zeros_like(path.timesteps))
    with pytest.raises(InputError, match="UNet2DModel has no embedding of the timestep"):
        time_scale(denoiser_of(pipe), at_zero)


def test_a_copy_takes_no_random_numbers_and_leaves_the_denoiser_alone():
    denoiser = make("unet")
    before, state = copy.deepcopy(denoiser.state_dict()), torch.get_rng_state()
    conditioning = time_conditioning(denoiser)
    conditioning.embedding.linear_1.weight.zero_()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())


def test_a_condition_beside_the_timestep_is_left_out():
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_proj = make("unet").time_proj
            self.time_embedding = TimestepEmbedding(32, 16, cond_proj_dim=8)

    conditioning = time_conditioning(Distilled())
    assert not any("cond_proj" in name for name, _ in conditioning.named_parameters())


def test_a_denoiser_without_one_is_refused():
    with pytest.raises(
        InputError, match="routing must be learned or segments: Linear has no embedding"
    ):
        time_conditioning(nn.Linear(1, 1))


@pytest.mark.parametrize("kind", ["learned", "denoiser", "segments"])
def test_a_router_is_made_of_its_kind(kind):
    router = router_for(kind, 3, 2, make("unet"))
    assert router.kind == kind
    assert router(torch.tensor([1, 900])).shape == (2, 3, 2)


def test_a_router_that_reads_the_denoiser_scales_the_times_of_flows():
    conditioning = time_conditioning(make("flux"))
    flow = LearnedRouter(8, 4, torch.Generator().manual_seed(0), 1000, conditioning)
    other = LearnedRouter(8, 4, torch.Generator().manual_seed(0), 1, conditioning)
    assert torch.equal(flow(torch.linspace(0, 1, 11)), other(torch.linspace(0, 1000, 11)))
