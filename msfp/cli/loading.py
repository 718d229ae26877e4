"""Loading pipelines for commands: folders, checkpoints, and the models that ship."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from msfp.errors import InputError
from msfp.experiments.reference.names import ReferenceName
from msfp.pipelines.packages import HUB_NAME

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from msfp.support.paging import PageFolder

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


def load_pipeline(
    model: str, arguments: argparse.Namespace, pages: PageFolder | None = None
) -> DiffusionPipeline:
    """Return the full-precision pipeline in a folder, or a model that ships.

    Args:
        model: The folder, a name on the hub, or the name of a model that ships.
        arguments: Those of the command.
        pages: Where the weights are that loading casts. They are on another device than the CPU
            while they are used, then. None has all weights on the device.
    """
    if pages is None:
        return _loaded(model, arguments, None)
    # transformers casts in other threads otherwise.
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with pages.taking_casts():
        return _loaded(model, arguments, pages.folder)


def _loaded(model: str, arguments: argparse.Namespace, offload: Path | None) -> DiffusionPipeline:
    import torch
    from diffusers import DiffusionPipeline

    from msfp.checkpoint.io import quantized_components
    from msfp.experiments.reference.pipelines import reference_pipeline
    from msfp.pipelines.class_conditional import pipeline_class
    from msfp.pipelines.packages import check_packages, variant_of

    if model in REFERENCES:
        return prepared(reference_pipeline(model), arguments, offload=offload is not None)
    folder, kind, variant = Path(model), DiffusionPipeline, None
    check_model(model)
    if folder.is_dir():
        if quantized_components(folder):
            raise InputError(f"{model} is quantized already: name a full-precision pipeline")
        check_packages(folder)
        kind, variant = pipeline_class(folder), variant_of(folder)
        _check_space(folder, arguments, offload)
    dtype = getattr(torch, arguments.dtype)
    try:
        pipe = kind.from_pretrained(
            model, torch_dtype=dtype, variant=variant,
            local_files_only=folder.is_dir() or arguments.local_files_only,
        )  # fmt: skip
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{model} cannot be loaded: {str(error).splitlines()[0]}") from error
    return prepared(pipe, arguments, offload=offload is not None)


def _check_space(folder: Path, arguments: argparse.Namespace, offload: Path | None) -> None:
    """Raise InputError if what loading casts does not fit the memory, or the disk if offloaded."""
    import torch

    from msfp.pipelines.weight_files import cast_bytes
    from msfp.support.memory import available_bytes, free_disk

    needed = cast_bytes(folder, getattr(torch, arguments.dtype))
    free = available_bytes() if offload is None else free_disk(offload)
    if free is not None and needed > free:
        place = "memory" if offload is None else f"the disk of {offload}"
        advice = ": give --offload" if offload is None and hasattr(arguments, "offload") else ""
        raise InputError(
            f"{folder} needs {needed / 1e9:.1f} GB in {arguments.dtype}, of which "
            f"{free / 1e9:.1f} GB of {place} are free{advice}"
        )


def fuse_loras(pipe: Any, loras: Sequence[tuple[str, float]]) -> None:
    """Fuse LoRAs, each with its weight, with the weights of a pipeline and its text encoders."""
    from msfp.training.lora_fusion import UNREADABLE

    if not loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"lora cannot be given: diffusers loads none into {type(pipe).__name__}")
    for index, (name, weight) in enumerate(loras):
        try:
            pipe.load_lora_weights(name, adapter_name=f"lora-{index}")
            pipe.set_adapters(f"lora-{index}", weight)
        except UNREADABLE as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"lora {name} cannot be loaded: {line}") from error
        parts = [part for part in pipe._lora_loadable_modules if getattr(pipe, part, None)]
        pipe.fuse_lora(parts)
        pipe.unload_lora_weights()


def check_model(model: str) -> None:
    """Raise InputError unless a model is a pipeline folder, or may be a name on the hub."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise InputError(
                f"{model} is not a pipeline folder: it has no model_index.json; models that ship "
                f"are {NAMED}"
            )
    elif folder.exists() or HUB_NAME.fullmatch(model) is None:
        raise InputError(
            f"{model} is no folder: it must be a pipeline folder, a name on the hub such as "
            f"owner/name, or a model that ships, {NAMED}"
        )


def load_checkpoint(folder: Path, arguments: argparse.Namespace) -> DiffusionPipeline:
    """Return the quantized pipeline in a folder."""
    from msfp.checkpoint.io import load

    return prepared(load(folder), arguments)


def load_any(model: Path, arguments: argparse.Namespace) -> DiffusionPipeline:
    """Return the pipeline in a folder, quantized or not, or a model that ships."""
    from msfp.checkpoint.io import quantized_components

    plain = (model / "model_index.json").is_file() and not quantized_components(model)
    if plain or not model.exists() or str(model) in REFERENCES:
        return load_pipeline(str(model), arguments)
    return load_checkpoint(model, arguments)


def prepared(pipe: Any, arguments: argparse.Namespace, *, offload: bool = False) -> Any:
    """Return a pipeline with the dtype, the device and the sampler that were given.

    Args:
        pipe: The pipeline, on the CPU.
        arguments: Those of the command.
        offload: Whether its weights are on the device only while they are used.
    """
    import torch

    from msfp.pipelines.sampler import check_dtype
    from msfp.schedulers.samplers import use_sampler

    dtype = getattr(torch, arguments.dtype)
    check_dtype(pipe, dtype)
    if arguments.sampler is not None:
        use_sampler(pipe, arguments.sampler)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe if pipe.dtype == dtype else pipe.to(dtype)
    if offload and torch.device(device(arguments)).type != "cpu":
        pipe.enable_sequential_cpu_offload(device=device(arguments))
        return pipe
    return pipe.to(device(arguments))
