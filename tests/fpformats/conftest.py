"""The laws run on every backend: on the middle one of three instruction sets with `-m slow`."""

import pytest

from fpformats.engine import backends

NAMES = backends.available()
MIDDLE = "avx2" if "avx512" in NAMES else None


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow) if n == MIDDLE else n for n in NAMES],
)
def backend(request):
    """Compute in one way throughout a module, as hypothesis wants it throughout a test."""
    with backends.using(request.param):
        yield request.param
