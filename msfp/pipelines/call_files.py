"""Saving the arguments of a denoiser's forward calls, to repeat the same calls later.

folder/
  00000.safetensors   the tensors of one forward call; the metadata have the argument structure
  00001.safetensors ...
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.sampler import PipelineCall, check_calls
from msfp.support.checks import check_path
from msfp.support.container import FileKind, Header, read, write
from msfp.support.hooks import hooked
from msfp.support.offloading import work_device


def _named_arguments(header: Header) -> Header:
    """Return a header of version 1 in version 2: its facts were the tree of arguments itself."""
    return Header({}, {"arguments": header.facts})


KIND = FileKind("a saved call", first_key="msfp_call", migrations={1: _named_arguments})


def save_calls(
    model: DiffusionPipeline | nn.Module,
    folder: str | Path,
    *,
    calls: PipelineCall | Sequence[PipelineCall],
) -> list[Path]:
    """Make calls of a pipeline, and write each forward call of its denoiser to a file.

    Args:
        model: A pipeline, or the denoiser itself.
        folder: A folder, existing or new. New files are numbered after existing ones.
        calls: One or more functions that run the model.

    Returns:
        The files that were written.

    Raises:
        InputError: If an argument is not made of tensors, numbers, strings, lists and dictionaries.

    Example:
        >>> import tempfile
        >>> folder, network = tempfile.mkdtemp(), nn.Linear(3, 3)
        >>> files = save_calls(network, folder, calls=lambda network: network(torch.ones(2, 3)))
        >>> [file.name for file in files]
        ['00000.safetensors']
    """
    folder, given = check_path("folder", folder), check_calls("calls", calls)
    folder.mkdir(parents=True, exist_ok=True)
    first = len(call_files(folder))
    files: list[Path] = []

    def save(_denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        tree = _stripped({"args": list(args), "kwargs": kwargs}, "", tensors)
        file = folder / f"{first + len(files):05d}.safetensors"
        write(file, KIND, tensors, {"arguments": tree})
        files.append(file)

    hook = denoiser_of(model).register_forward_pre_hook(save, with_kwargs=True)
    with hooked([hook]), torch.no_grad():
        for call in given:
            call(model)
    return files


def call_files(folder: str | Path) -> list[Path]:
    """Return the files that `save_calls` wrote to a folder, in order."""
    return sorted(Path(folder).glob("*.safetensors"))


def load_calls(folder: str | Path) -> list[PipelineCall]:
    """Return the saved calls of a folder, for `calibrate`; each file is read when its call is made.

    Raises:
        InputError: If the folder has no saved calls.
    """
    files = call_files(folder)
    if not files:
        raise InputError(f"{folder} holds no saved calls: msfp.save_calls writes them")
    return [_SavedCall(file) for file in files]


class _SavedCall:
    """A function that repeats the call saved in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, model: DiffusionPipeline | nn.Module) -> None:
        """Run the denoiser of a pipeline on the device of the denoiser."""
        denoiser = denoiser_of(model)
        header, tensors = read(self.file, KIND, work_device(denoiser))
        try:
            arguments = _restored(header.facts["arguments"], tensors)
        except (LookupError, ValueError, TypeError) as error:
            raise InputError(f"{self.file} cannot be read as {KIND.name}: {error}") from error
        denoiser(*arguments["args"], **arguments["kwargs"])


def _stripped(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON, with tensors replaced by their names in the file."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": {k: _stripped(v, f"{path}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_stripped(v, f"{path}.{k}", tensors) for k, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"argument{path} of the denoiser is a {type(value).__name__}, which cannot be saved"
    )


def _restored(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value that `_stripped` converted to JSON."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "list":
        return [_restored(item, tensors) for item in content]
    return {key: _restored(item, tensors) for key, item in content.items()}
