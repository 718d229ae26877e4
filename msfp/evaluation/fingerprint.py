"""The fingerprint of a comparison of two pipelines, which identifies its saved state."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.evaluation.dataset_statistics import DatasetStatistics
from msfp.layers.base import quantized_layers, quantized_networks
from msfp.pipelines.denoiser import by_name
from msfp.pipelines.sampler import Sampler
from msfp.support.autosave import run_as_fingerprint
from msfp.support.container import FileKind, Header, Named
from msfp.support.fingerprints import digest


def _first_fingerprint(header: Header) -> Header:
    """Convert the header of a version 1 state, which called the statistics "reference"."""
    told = run_as_fingerprint(header)
    known = {key: value for key, value in told.fingerprint.items() if key != "version"}
    known["statistics"] = known.pop("reference")
    known["formats"] = [
        each.replace("branch_entries", "branch_adapters") for each in known["formats"]
    ]
    return told._replace(fingerprint=known)


def _first_tensors(tensors: Named) -> Named:
    """Convert the tensors of a version 1 state, whose names did not contain their metric."""
    renamed = {"count": tensors["0/count"]}
    for name, tensor in tensors.items():
        of_features = name[0].isdigit()
        renamed[f"frechet/{name}" if of_features else name.removeprefix("pairs/")] = tensor
    return renamed


STATE = FileKind(
    "a state of msfp evaluate",
    first_key="a state of msfp evaluate",
    migrations={1: _first_fingerprint},
    tensor_migrations={1: _first_tensors},
)


def comparison_fingerprint(
    calls: list[tuple[DiffusionPipeline, int]],
    sampler: Sampler,
    count: int,
    statistics: DatasetStatistics | None,
) -> dict[str, Any]:
    """Return the values that must be equal for a comparison to resume, as plain JSON types.

    Args:
        calls: The quantized pipeline and the full-precision one, each with the seed of its noise.
        sampler: How the pipelines are called.
        count: Number of images in each set.
        statistics: Statistics of a data set, or None.

    Raises:
        InputError: If the weights of a pipeline are not in memory.
    """
    (quantized, seed), (full, _), *_ = calls
    layers = by_name(quantized_networks(quantized), quantized_layers)
    real = {} if statistics is None else vars(statistics.statistics)
    return {
        "count": int(count),
        "seed": int(seed),
        **sampler.to_dict(),
        "full-precision pipeline": pipeline_digest(full),
        "quantized pipeline": pipeline_digest(quantized),
        "formats": [str(layer.formats) for layer in layers.values()],
        "statistics": digest((name, torch.as_tensor(value)) for name, value in real.items()),
    }


def pipeline_digest(pipe: DiffusionPipeline) -> str:
    """Return a digest of the networks and the scheduler settings of a pipeline."""
    tensors = {
        f"{part}.{name}": value
        for part, network in pipe.components.items()
        if isinstance(network, nn.Module)
        for name, value in network.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    away = next((name for name, value in tensors.items() if value.is_meta), None)
    if away is not None:
        raise InputError(f"state must be of pipelines in memory, and {away} is not")
    scheduler = getattr(pipe, "scheduler", None)
    # Keys with an underscore are internal to diffusers. The order of some differs by process.
    settings = {
        key: value
        for key, value in getattr(scheduler, "config", {}).items()
        if not key.startswith("_")
    }
    text = json.dumps([type(scheduler).__name__, settings], sort_keys=True, default=str)
    said = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return digest([("scheduler", said), *sorted(tensors.items())])
