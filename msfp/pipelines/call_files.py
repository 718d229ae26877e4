"""Keeping the arguments of a denoiser's forwards on disk, to make the same calls again.

folder/
  00000.safetensors   the tensors of one call; its metadata say where they go
  00001.safetensors ...
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from msfp.errors import InputError
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.sampler import PipelineCall
from msfp.support.files import atomic_file

KEY = "msfp_call"


def store_calls(
    pipe: DiffusionPipeline | nn.Module, call: PipelineCall, folder: str | Path
) -> list[Path]:
    """Make a call of a pipeline, and write each forward of its denoiser to a file.

    Args:
        pipe: A pipeline, or the denoiser itself.
        call: What to do with it.
        folder: A folder, which may hold files already; new ones get the numbers that follow.

    Returns:
        The files that were written.

    Raises:
        InputError: If an argument is not made of tensors, numbers, strings, lists and dictionaries.

    Example:
        >>> import tempfile
        >>> folder, network = tempfile.mkdtemp(), nn.Linear(3, 3)
        >>> files = store_calls(network, lambda network: network(torch.ones(2, 3)), folder)
        >>> [file.name for file in files]
        ['00000.safetensors']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first = len(stored_files(folder))
    files: list[Path] = []

    def write(_denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        tree = _stripped({"args": list(args), "kwargs": kwargs}, "", tensors)
        file = folder / f"{first + len(files):05d}.safetensors"
        with atomic_file(file) as partial:
            save_file(tensors, partial, metadata={KEY: json.dumps(tree)})
        files.append(file)

    handle = denoiser_of(pipe).register_forward_pre_hook(write, with_kwargs=True)
    try:
        with torch.no_grad():
            call(pipe)
    finally:
        handle.remove()
    return files


def stored_files(folder: str | Path) -> list[Path]:
    """Return the files of a folder that `store_calls` wrote, in order."""
    return sorted(Path(folder).glob("*.safetensors"))


def stored_calls(folder: str | Path) -> list[PipelineCall]:
    """Return the stored calls of a folder, for `calibrate`; each is read when it is made.

    Raises:
        InputError: If the folder holds none.
    """
    files = stored_files(folder)
    if not files:
        raise InputError(f"{folder} holds no stored calls: store_calls writes them")
    return [_Replay(file) for file in files]


class _Replay:
    """Makes the call that a file holds."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, pipe: DiffusionPipeline | nn.Module) -> None:
        """Run the denoiser of a pipeline, on its device."""
        denoiser = denoiser_of(pipe)
        device = next(denoiser.parameters()).device
        try:
            with safe_open(self.file, framework="pt", device=str(device)) as opened:
                tree = json.loads((opened.metadata() or {})[KEY])
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, LookupError, ValueError) as error:
            raise InputError(f"{self.file} is not a stored call: {error}") from error
        arguments = _restored(tree, tensors)
        denoiser(*arguments["args"], **arguments["kwargs"])


def _stripped(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON, its tensors replaced by their names in the file."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": {k: _stripped(v, f"{path}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_stripped(v, f"{path}.{k}", tensors) for k, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"argument{path} of the denoiser is a {type(value).__name__}: not stored")


def _restored(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value that `_stripped` made JSON of."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "list":
        return [_restored(item, tensors) for item in content]
    return {key: _restored(item, tensors) for key, item in content.items()}
