import copy

import pytest
from tiny import SAMPLER, tiny_pipeline, tiny_quantized

from msfp import record_trajectories


@pytest.fixture(scope="session")
def full():
    """The full-precision pipeline; not to be changed."""
    return tiny_pipeline()


@pytest.fixture(scope="session")
def path(full):
    return record_trajectories(full, calls=SAMPLER.calls(8, seed=5))


@pytest.fixture(scope="session")
def held_out(full):
    return record_trajectories(full, calls=SAMPLER.calls(4, seed=77))


@pytest.fixture(scope="session")
def quantized_once(full):
    return tiny_quantized(full)


@pytest.fixture
def student(quantized_once):
    """A fresh trainable quantized pipeline."""
    return copy.deepcopy(quantized_once)
