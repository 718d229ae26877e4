import copy

import numpy as np
import pytest
import torch

from msfp import (
    FinetuneConfig,
    InputError,
    denoising_factors,
    finetune,
    pack,
    record_trajectories,
)
from msfp.evaluation.prediction_errors import noise_errors
from msfp.layers.base import quantized_layers

SHORT = {"rank": 4, "steps": 12, "batch": 8}


@pytest.fixture(scope="module")
def held_out(reference, sampler):
    return record_trajectories(reference, calls=sampler.calls(8, seed=77))


@pytest.mark.parametrize("hub", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_it_lowers_the_error_on_trajectories_it_has_not_seen(
    quantized, trajectories, held_out, hub
):
    pipe, _ = quantized()
    before = np.mean(noise_errors(pipe.unet, trajectories=held_out))
    finetune(pipe.unet, FinetuneConfig(hub=hub, **SHORT), trajectories=trajectories)
    assert np.mean(noise_errors(pipe.unet, trajectories=held_out)) < 0.8 * before


def test_it_is_reproduced_by_its_seed_and_changed_by_another(quantized, trajectories):
    weights = []
    for seed in (0, 0, 1):
        pipe, _ = quantized()
        finetune(
            pipe.unet,
            FinetuneConfig(hub=2, seed=seed, rank=2, steps=3, batch=4),
            trajectories=trajectories,
        )
        weights.append(pipe.unet.mid_block.resnets[0].conv1.codes)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_it_leaves_the_full_precision_model_alone(reference, quantized, trajectories):
    before = copy.deepcopy(reference.unet.state_dict())
    finetune(
        quantized()[0].unet, FinetuneConfig(rank=2, steps=2, batch=4), trajectories=trajectories
    )
    assert all(torch.equal(before[k], v) for k, v in reference.unet.state_dict().items())


def test_it_ends_packed_with_an_adapter_for_each_lora(quantized, trajectories):
    pipe, _ = quantized()
    finetune(pipe.unet, FinetuneConfig(hub=3, rank=2, steps=2, batch=4), trajectories=trajectories)
    assert all(layer.adapters == 3 for layer in quantized_layers(pipe.unet).values())


def test_the_weighting_changes_what_is_learned(quantized, trajectories, reference):
    factors = denoising_factors(reference.scheduler, 4)
    outcomes = []
    for power in (0.0, 2.0):
        pipe, _ = quantized()
        config = FinetuneConfig(rank=4, steps=8, batch=8, dfa_power=power)
        finetune(pipe.unet, config, trajectories=trajectories, factors=factors)
        outcomes.append(pipe.unet.conv_out.codes)
    assert not torch.equal(*outcomes)


@pytest.mark.parametrize("factors", [None, {10: 1.0, 0: 1.0}])
def test_missing_factors_are_refused_before_anything_is_changed(quantized, trajectories, factors):
    pipe, _ = quantized()
    config = FinetuneConfig(dfa_power=1.0)
    with pytest.raises(InputError, match="factors must be given for every recorded timestep"):
        finetune(pipe.unet, config, trajectories=trajectories, factors=factors)
    assert all(layer.hub is None for layer in quantized_layers(pipe.unet).values())


def test_a_plain_or_a_packed_denoiser_is_refused(reference, quantized, trajectories):
    packed, _ = quantized()
    pack(packed.unet)
    for denoiser in (copy.deepcopy(reference.unet), packed.unet):
        with pytest.raises(InputError, match="must have been quantized and not yet packed"):
            finetune(denoiser, FinetuneConfig(), trajectories=trajectories)


def test_a_loss_that_is_not_finite_stops_with_the_step_named(quantized, trajectories):
    pipe, _ = quantized()
    breaking = copy.deepcopy(trajectories)
    with pytest.raises(InputError, match="loss is nan at step 1"):
        finetune(
            pipe.unet,
            FinetuneConfig(rank=2, steps=2, batch=4),
            trajectories=breaking,
            progress=lambda *_: breaking.predictions.fill_(torch.nan),
        )
