from typing import get_args

import pytest
import torch
from families import make

from msfp.layers.lora.routers import ROUTERS, EmbeddingRouter, LearnedRouter, SegmentRouter
from msfp.layers.lora.time_embedding import time_conditioning
from msfp.training.config import Routing


def test_every_router_that_a_config_names_is_there():
    assert set(get_args(Routing)) <= ROUTERS.keys()
    assert all(router.kind == kind for kind, router in ROUTERS.items())


@pytest.mark.parametrize("kind", get_args(Routing))
def test_a_new_router_chooses_one_adapter_for_each_layer(kind):
    router = ROUTERS[kind].new(3, 2, torch.arange(0, 1000, 50), torch.Generator())
    assert type(router) is ROUTERS[kind]
    assert torch.equal(router(torch.tensor([1, 900])).sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_that_is_to_be_filled_is_of_its_kind(kind):
    router = ROUTERS[kind].placeholder(3, 2, make("unet"))
    assert router.kind == kind
    assert router(torch.tensor([1, 900])).shape == (2, 3, 2)


def test_choices_are_exactly_one_hot_and_differ_between_layers_and_timesteps():
    torch.manual_seed(0)
    choices = LearnedRouter(8, 4)(torch.arange(0, 1000, 50))
    assert set(choices.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(choices.sum(-1), torch.ones(20, 8))
    assert len(choices.argmax(-1).unique(dim=0)) > 1
    assert len(choices.argmax(-1).unique(dim=1).T) > 1


def test_segments_have_equally_many_of_the_sampler_s_timesteps():
    router = SegmentRouter.new(3, 4, torch.arange(0, 1000, 50), torch.Generator())
    counts = router(torch.arange(0, 1000, 50)).sum(0)
    assert torch.equal(counts, torch.full((3, 4), 5.0))
    assert router(torch.tensor([999, 0])).argmax(-1).tolist() == [[3] * 3, [0] * 3]


def test_times_from_zero_to_one_are_told_apart_as_others_are():
    flow = LearnedRouter(8, 4, torch.Generator().manual_seed(0), time_scale=1000)
    other = LearnedRouter(8, 4, torch.Generator().manual_seed(0))
    times = torch.arange(0, 1, 0.125)
    assert torch.equal(flow(times), other(times * 1000))


@pytest.mark.parametrize(("largest", "scale"), [(999.0, 1.0), (1.0, 1000.0)])
def test_a_new_router_reads_the_times_of_flows_as_those_of_others(largest, scale):
    timesteps = torch.linspace(0, largest, 8)
    router = LearnedRouter.new(8, 4, timesteps, torch.Generator().manual_seed(0))
    same = LearnedRouter(8, 4, torch.Generator().manual_seed(0), scale)
    assert router.time_scale == scale
    assert torch.equal(router(timesteps), same(timesteps))


def test_a_router_that_reads_the_denoiser_scales_the_times_of_flows():
    router = EmbeddingRouter(8, 4, time_conditioning(make("flux")))
    expected = router(torch.linspace(0, 1000, 11))
    router.time_scale.fill_(1000)  # as a checkpoint does
    assert torch.equal(router(torch.linspace(0, 1, 11)), expected)
    assert len(expected.argmax(-1).unique(dim=0)) > 1
