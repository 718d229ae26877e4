"""The laws run on every backend: on the middle one of three instruction sets with `-m slow`."""

import functools

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


def _run(names, check):
    for name in names:
        with backends.using(name):
            try:
                check()
            except AssertionError as error:
                error.add_note(f"computed by {name}")
                raise


@pytest.fixture(
    scope="module",
    params=[
        pytest.param([name for name in NAMES if name != MIDDLE], id="backends"),
        *([pytest.param([MIDDLE], id=MIDDLE, marks=pytest.mark.slow)] if MIDDLE else []),
    ],
)
def each_backend(request):
    """A function that runs a check in every way, where what is expected takes long to compute."""
    return functools.partial(_run, request.param)
