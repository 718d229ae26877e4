"""Proofs of minutes run only when they are asked for; without a GPU, Triton interprets."""

import os

# Workers that share the cores use one each; read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

collect_ignore_glob = ["*conftest.py"]  # no doctests there, and all of one name
collect_ignore = []
try:
    import fpformats.kernels.cuda  # noqa: F401
except ImportError:
    collect_ignore += ["fpformats/kernels/cuda.py", "fpformats/kernels/triton_kernels.py"]
    collect_ignore += ["msfp/layers/execution/triton_kernels.py"]


def pytest_collection_modifyitems(config, items):
    """Skip what is marked slow, unless a marker or a test is named."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    skip = pytest.mark.skip(reason="slow: run with -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)
