"""What tells one comparison of two pipelines from another, by which a state is known."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.evaluation.dataset_statistics import ReferenceStatistics
from msfp.layers.base import quantized_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.sampler import Sampler
from msfp.support.run_files import digest

KIND = "a state of msfp evaluate"
VERSION = 1
"""Of what the tensors mean."""


def comparison_facts(
    calls: list[tuple[DiffusionPipeline, int]],
    sampler: Sampler,
    count: int,
    reference: ReferenceStatistics | None,
) -> dict[str, Any]:
    """Return what makes a comparison another one, as JSON gives it back.

    Args:
        calls: The quantized pipeline and the full-precision one, each with the seed of its noise.
        sampler: How they are called.
        count: Images of each set.
        reference: Of a data set, or None.

    Raises:
        InputError: If the weights of a pipeline are not in memory.
    """
    (quantized, seed), (full, _), *_ = calls
    layers = quantized_layers(denoiser_of(quantized))
    real = {} if reference is None else vars(reference.statistics)
    return {
        "version": VERSION,
        "count": int(count),
        "seed": int(seed),
        **asdict(sampler),
        "conditions": list(sampler.conditions),
        "full-precision pipeline": pipeline_digest(full),
        "quantized pipeline": pipeline_digest(quantized),
        "formats": [str(layer.formats) for layer in layers.values()],
        "reference": digest((name, torch.as_tensor(value)) for name, value in real.items()),
    }


def pipeline_digest(pipe: DiffusionPipeline) -> str:
    """Return digits that tell pipelines apart: by their networks and the sampler's settings."""
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
    # Others are notes of diffusers, some of them in another order in each process.
    settings = {
        key: value
        for key, value in getattr(scheduler, "config", {}).items()
        if not key.startswith("_")
    }
    text = json.dumps([type(scheduler).__name__, settings], sort_keys=True, default=str)
    said = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return digest([("scheduler", said), *sorted(tensors.items())])
