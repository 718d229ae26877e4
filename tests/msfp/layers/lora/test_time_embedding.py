import copy

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from families import call, make
from torch import nn

from msfp import InputError
from msfp.layers.lora.time_embedding import time_conditioning

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


def test_it_is_frozen_and_float32():
    denoiser = make("unet").bfloat16()
    narrow = time_conditioning(denoiser).parameters()
    assert {(p.dtype, p.requires_grad) for p in narrow} == {(torch.float32, False)}
    assert denoiser.dtype == torch.bfloat16


def test_of_several_it_is_the_one_that_is_least_deep():
    class Part(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.proj = Timesteps(8, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.embedder = TimestepEmbedding(8, width)

    denoiser = nn.ModuleDict({"text": nn.ModuleDict({"refiner": Part(4)}), "time": Part(16)})
    assert time_conditioning(denoiser).width == 16


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
    with pytest.raises(InputError, match="Linear has no embedding of the timestep"):
        time_conditioning(nn.Linear(1, 1))
