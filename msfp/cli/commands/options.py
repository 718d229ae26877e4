"""Arguments that commands share, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msfp.config import MAX_BITS, MIN_BITS
from msfp.errors import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from msfp.pipelines.sampler import Sampler

REFERENCE = "digits"
DTYPES = ("float32", "float16", "bfloat16")
SAMPLERS = ("ddim", "ddpm", "plms", "dpm++")
STANDARD_OUTPUT = Path("-")


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of whole numbers in a range."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: it must be a whole number from {low} to {high}"
            )
        return int(text)

    return parse


def guidance(text: str) -> float:
    """Parse a guidance scale."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0 to 100")
    return number


seed = whole(0, 2**32 - 1)
bits = whole(MIN_BITS, MAX_BITS)


def bits_or_none(text: str) -> int | None:
    """Parse a bit width, or "none"."""
    return None if text == "none" else bits(text)


def add_bits(command: argparse.ArgumentParser) -> None:
    """Add the bit widths."""
    for name, what, parse in (
        ("weights", "weights", bits),
        ("activations", "layer inputs, or 'none' to leave them", bits_or_none),
        ("first-last", "weights and inputs of the first and last layer", bits),
    ):
        default = 8 if name == "first-last" else 4
        command.add_argument(
            f"--{name}", type=parse, default=default, metavar="BITS",
            help=f"{MIN_BITS} to {MAX_BITS} bits of {what} (default {default})",
        )  # fmt: skip


def add_features(command: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the network whose features Frechet distances are measured in."""
    default = "" if required else " (default: of the reference; else digits for digits, or pixels)"
    command.add_argument(
        "--features", required=required, metavar="NETWORK",
        help="of the Frechet distance: pixels, digits (16 x 16 pixels, of the mean of colours), a "
        "TorchScript file or module:function"
        + default,
    )  # fmt: skip


def add_sampling(
    command: argparse.ArgumentParser, *, count: int, first_seed: int = 0, training: bool = False
) -> None:
    """Add how a pipeline is called; in training, `--steps` and `--batch` are something else."""
    prefix = "sampler-" if training else ""
    group = command.add_argument_group("how the pipeline is called")
    conditions = group.add_mutually_exclusive_group()
    conditions.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a text file with a prompt in each line"
    )
    conditions.add_argument(
        "--labels", type=whole(0, 10**6), nargs="+", metavar="N", help="class labels"
    )
    group.add_argument(
        "--count", type=whole(1, 10**6), default=count,
        help=f"images; prompts and labels are taken in turn (default {count})",
    )  # fmt: skip
    group.add_argument(
        f"--{prefix}steps", dest="sampler_steps", type=whole(1, 1000), default=20,
        help="sampler steps (default 20)",
    )  # fmt: skip
    group.add_argument(
        f"--{prefix}batch", dest="sampler_batch", type=whole(1, 4096), default=16,
        help="images in one call (default 16)",
    )  # fmt: skip
    group.add_argument("--guidance-scale", type=guidance, help="default: that of the pipeline")
    group.add_argument("--sampler", choices=SAMPLERS, help="default: that of the pipeline")
    group.add_argument(
        "--seed", type=seed, default=first_seed, help=f"of the noise (default {first_seed})"
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    group.add_argument("--device", help="such as cuda (default: cuda where there is one)")


def check_sampling(arguments: argparse.Namespace) -> Sampler:
    """Return how the pipeline is to be called.

    Raises:
        InputError: If the prompts cannot be read or there is no such device.
    """
    from msfp.pipelines.sampler import Sampler

    device(arguments)
    conditions = arguments.labels or _prompts(arguments.prompts)
    batch = min(arguments.sampler_batch, arguments.count)
    return Sampler(arguments.sampler_steps, batch, tuple(conditions), arguments.guidance_scale)


def device(arguments: argparse.Namespace) -> str:
    """Return the device that was asked for, or CUDA where there is one.

    Raises:
        InputError: If there is no such device.
    """
    import torch

    name: str = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used: {line}") from error
    return name


def _prompts(file: Path | None) -> list[str]:
    """Return the lines of a file that are not empty."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts {file} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"prompts {file} must hold a prompt in at least one line")
    return prompts


def load_pipeline(model: str, arguments: argparse.Namespace) -> DiffusionPipeline:
    """Return the full-precision pipeline in a folder, or the reference model."""
    import torch

    from msfp.checkpoint.io import quantized_component
    from msfp.experiments.reference import ddim_pipeline
    from msfp.pipelines.class_conditional import pipeline_class

    if model == REFERENCE:
        return prepared(ddim_pipeline(), arguments)
    folder = Path(model)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{model} is not a pipeline folder: it has no model_index.json")
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
    """Return the pipeline in a folder, quantized or not, or the reference model."""
    from msfp.checkpoint.io import quantized_component

    plain = (model / "model_index.json").is_file() and quantized_component(model) is None
    if plain or str(model) == REFERENCE:
        return load_pipeline(str(model), arguments)
    return load_checkpoint(model, arguments)


def prepared(pipe: Any, arguments: argparse.Namespace) -> Any:
    """Return a pipeline with the dtype, the device and the sampler that were asked for."""
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


def add_report(command: argparse.ArgumentParser) -> None:
    """Add the file of the report."""
    command.add_argument(
        "--report", type=Path, metavar="FILE", help="a new .html file: one page with pictures"
    )


def add_state(command: argparse.ArgumentParser) -> None:
    """Add the file that an interrupted run goes on from."""
    command.add_argument(
        "--state", type=Path, metavar="FILE",
        help="a .safetensors file: written each minute, gone on from, and removed at the end",
    )  # fmt: skip


def check_files(arguments: argparse.Namespace, **suffixes: str) -> None:
    """Check files that a command is to write, where they were asked for.

    Args:
        arguments: Of the command.
        **suffixes: How the names of the files must end, by the name of the argument.
    """
    from msfp.support.files import check_new_file

    for argument, suffix in suffixes.items():
        path = getattr(arguments, argument)
        if path is not None and path != STANDARD_OUTPUT:
            check_new_file(argument, path, suffix)


def write_text(path: Path, text: str) -> None:
    """Write a file, or to standard output."""
    from msfp.support.files import atomic_file

    if path == STANDARD_OUTPUT:
        print(text, end="")
        return
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
