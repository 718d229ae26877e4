import copy

import numpy as np
import pytest
import torch

from msfp import (
    QuantizationConfig,
    Sampler,
    calibrate,
    pack,
    quantize,
    record_trajectories,
    reference_pipeline,
)

torch.manual_seed(0)


@pytest.fixture(scope="session")
def sampler():
    return Sampler(steps=4, batch=8)


@pytest.fixture(scope="session")
def reference():
    """The full-precision reference pipeline; not to be changed."""
    return reference_pipeline()


@pytest.fixture(scope="session")
def calibration(reference, sampler):
    return calibrate(reference, calls=sampler.calls(8, seed=1))


@pytest.fixture(scope="session")
def trajectories(reference, sampler):
    return record_trajectories(reference, calls=sampler.calls(16, seed=5))


@pytest.fixture(scope="session")
def quantized(reference, calibration):
    """A function that gives a fresh trainable quantized copy of the reference and its summaries.

    Weights are rounded to the nearest values, where the config does not say otherwise.
    """
    made = {}

    def make(**config):
        if repr(config) not in made:
            pipe = copy.deepcopy(reference)
            request = QuantizationConfig(**{"refine": None} | config)
            made[repr(config)] = pipe, quantize(pipe, request, calibration=calibration)
        return copy.deepcopy(made[repr(config)])

    return make


@pytest.fixture(scope="session")
def packed(quantized):
    """The packed copy of the reference, and its summaries; not to be changed."""
    pipe, summaries = quantized()
    pack(pipe)
    return pipe, summaries


@pytest.fixture
def silu_inputs():
    normal = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    return normal / (1 + np.exp(-normal))
