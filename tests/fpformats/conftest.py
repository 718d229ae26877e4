"""Proofs of minutes run only when they are asked for, and the laws on every backend."""

import pytest

from fpformats import backends


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    skip = pytest.mark.skip(reason="slow: run with -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(scope="module", params=backends.available())
def backend(request):
    """Compute in one way throughout a module, as hypothesis wants it throughout a test."""
    with backends.using(request.param):
        yield request.param
