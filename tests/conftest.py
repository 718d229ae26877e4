"""Settings that all tests share."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# A busy machine is no failure: examples are not timed.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Layers that a test builds hold the same weights whichever tests ran before it."""
    torch.manual_seed(0)
