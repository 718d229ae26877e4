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
def other_trajectories(reference, sampler):
    return record_trajectories(reference, calls=sampler.calls(8, seed=77))


@pytest.mark.slow
@pytest.mark.parametrize("hub", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_it_lowers_the_error_on_trajectories_it_has_not_seen(
    quantized, trajectories, other_trajectories, hub
):
    pipe, _ = quantized()
    before = np.mean(noise_errors(pipe.unet, trajectories=other_trajectories))
    finetune(pipe.unet, FinetuneConfig(hub=hub, **SHORT), trajectories=trajectories)
    assert np.mean(noise_errors(pipe.unet, trajectories=other_trajectories)) < 0.8 * before


def test_it_is_reproduced_by_its_seed_and_changed_by_another(quantized_once, path):
    weights = []
    for seed in (0, 0, 1):
        pipe = copy.deepcopy(quantized_once)
        config = FinetuneConfig(hub=2, seed=seed, rank=2, steps=3, batch=4)
        finetune(pipe, config, trajectories=path)
        weights.append(pipe.unet.mid_block.resnets[0].conv1.codes)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_it_leaves_the_full_precision_model_alone(full, student, path):
    before = copy.deepcopy(full.unet.state_dict())
    finetune(student, FinetuneConfig(rank=2, steps=2, batch=4), trajectories=path)
    assert all(torch.equal(before[k], v) for k, v in full.unet.state_dict().items())


def test_it_ends_packed_with_an_adapter_for_each_lora(student, path):
    finetune(student, FinetuneConfig(hub=3, rank=2, steps=2, batch=4), trajectories=path)
    assert all(layer.adapters == 3 for layer in quantized_layers(student.unet).values())


def test_the_weighting_changes_what_is_learned(full, quantized_once, path):
    factors = denoising_factors(full.scheduler, 4)
    outcomes = []
    for power in (0.0, 2.0):
        pipe = copy.deepcopy(quantized_once)
        config = FinetuneConfig(rank=4, steps=8, batch=8, dfa_power=power)
        finetune(pipe, config, trajectories=path, factors=factors)
        outcomes.append(pipe.unet.mid_block.resnets[0].conv1.codes)
    assert not torch.equal(*outcomes)


@pytest.mark.parametrize("factors", [None, {10: 1.0, 0: 1.0}])
def test_missing_factors_are_refused_before_anything_is_changed(student, path, factors):
    config = FinetuneConfig(dfa_power=1.0)
    with pytest.raises(InputError, match="factors must be given for every recorded timestep"):
        finetune(student, config, trajectories=path, factors=factors)
    assert all(layer.hub is None for layer in quantized_layers(student.unet).values())


def test_a_plain_or_a_packed_denoiser_is_refused(full, student, path):
    pack(student)
    for denoiser in (copy.deepcopy(full.unet), student.unet):
        with pytest.raises(InputError, match="must have been quantized and not yet packed"):
            finetune(denoiser, FinetuneConfig(), trajectories=path)


def test_a_loss_that_is_not_finite_stops_with_the_step_named(student, path):
    breaking = copy.deepcopy(path)
    with pytest.raises(InputError, match="loss is nan at step 1"):
        finetune(
            student,
            FinetuneConfig(rank=2, steps=2, batch=4),
            trajectories=breaking,
            progress=lambda *_: breaking.predictions.fill_(torch.nan),
        )
