"""The laws run on every backend."""

import pytest

from fpformats import backends


@pytest.fixture(scope="module", params=backends.available())
def backend(request):
    """Compute in one way throughout a module, as hypothesis wants it throughout a test."""
    with backends.using(request.param):
        yield request.param
