"""Loading pipelines for commands: folders, checkpoints, and the models that ship."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from msfp.errors import InputError
from msfp.experiments.reference.names import ReferenceName

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

REFERENCES = get_args(ReferenceName)
NAMED = f"{', '.join(REFERENCES[:-1])} or {REFERENCES[-1]}"
"""The models that ship, as the help text lists them."""


def device(arguments: argparse.Namespace) -> str:
    """Return the device that was given; by default CUDA if it is available, else the CPU.

    Raises:
        InputError: If the device cannot be used.
    """
    import torch

    name: str = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used: {line}") from error
    return name


def load_pipeline(model: str, arguments: argparse.Namespace) -> DiffusionPipeline:
    """Return the full-precision pipeline in a folder, or a model that ships."""
    import torch

    from msfp.checkpoint.io import quantized_component
    from msfp.experiments.reference.pipelines import reference_pipeline
    from msfp.pipelines.class_conditional import pipeline_class

    if model in REFERENCES:
        return prepared(reference_pipeline(model), arguments)
    folder = Path(model)
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{model} is not a pipeline folder: it has no model_index.json; models that ship are "
            f"{NAMED}"
        )
    if quantized_component(folder) is not None:
        raise InputError(f"{model} is quantized already: name a full-precision pipeline")
    dtype = getattr(torch, arguments.dtype)
    try:
        pipe = pipeline_class(folder).from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{model} cannot be loaded: {str(error).splitlines()[0]}") from error
    return prepared(pipe, arguments)


def load_checkpoint(folder: Path, arguments: argparse.Namespace) -> DiffusionPipeline:
    """Return the quantized pipeline in a folder."""
    from msfp.checkpoint.io import load

    return prepared(load(folder), arguments)


def load_any(model: Path, arguments: argparse.Namespace) -> DiffusionPipeline:
    """Return the pipeline in a folder, quantized or not, or a model that ships."""
    from msfp.checkpoint.io import quantized_component

    plain = (model / "model_index.json").is_file() and quantized_component(model) is None
    if plain or str(model) in REFERENCES:
        return load_pipeline(str(model), arguments)
    return load_checkpoint(model, arguments)


def prepared(pipe: Any, arguments: argparse.Namespace) -> Any:
    """Return a pipeline with the dtype, the device and the sampler that were given."""
    import torch

    from msfp.pipelines.sampler import check_dtype
    from msfp.schedulers.samplers import use_sampler

    dtype = getattr(torch, arguments.dtype)
    check_dtype(pipe, dtype)
    if arguments.sampler is not None:
        use_sampler(pipe, arguments.sampler)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(device(arguments))
    return pipe if pipe.dtype == dtype else pipe.to(dtype)
