"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from msfp.cli.loading import device
from msfp.errors import InputError

if TYPE_CHECKING:
    from msfp.pipelines.sampler import Sampler

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


def lora(text: str) -> tuple[str, float]:
    """Parse a LoRA, and its weight after an equals sign, which is 1 if there is none."""
    name, _, weight = text.rpartition("=")
    try:
        return (name, float(weight)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0


seed = whole(0, 2**32 - 1)


def add_features(command: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the option for the feature network of Frechet distances."""
    default = (
        ""
        if required
        else " (default: those of --statistics; else those of a model that ships, or pixels)"
    )
    command.add_argument(
        "--features", required=required, metavar="NETWORK",
        help="features of the Frechet distance: pixels; digits (16 x 16 pixels, of the mean of "
        "colours); photographs (32 x 32 pixels); a TorchScript file; or module:function" + default,
    )  # fmt: skip


def add_sampling(
    command: argparse.ArgumentParser, *, count: int, first_seed: int = 0, training: bool = False
) -> None:
    """Add the options for sampling; in training, `--sampler-steps` and `--sampler-batch`."""
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
        "--count", type=whole(1, 10**6), default=count, metavar="N",
        help=f"images; prompts and labels are taken in turn (default: {count})",
    )  # fmt: skip
    group.add_argument(
        f"--{prefix}steps", dest="sampler_steps", type=whole(1, 1000), default=20, metavar="N",
        help="sampler steps (default: 20)",
    )  # fmt: skip
    group.add_argument(
        f"--{prefix}batch", dest="sampler_batch", type=whole(1, 4096), metavar="N",
        help="images in one call (default: 16, or 1 with --call)",
    )  # fmt: skip
    group.add_argument(
        "--call", metavar="JSON",
        help="further arguments of the call, such as '{\"image\": \"cat.png\"}'; files are read by "
        "their type",
    )  # fmt: skip
    group.add_argument(
        "--guidance-scale", type=guidance, metavar="X", help="default: that of the pipeline"
    )
    group.add_argument("--sampler", choices=SAMPLERS, help="default: that of the pipeline")
    group.add_argument(
        "--seed", type=seed, default=first_seed, metavar="N",
        help=f"seed of the noise (default: {first_seed})",
    )  # fmt: skip
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    group.add_argument(
        "--local-files-only", action="store_true",
        help="take a model that is named on the hub from its cache, without a download",
    )  # fmt: skip
    add_device(group)


def add_device(group: argparse._ActionsContainer) -> None:
    """Add the option for the device."""
    group.add_argument("--device", help="such as cuda (default: cuda where there is one)")


def check_sampling(arguments: argparse.Namespace) -> Sampler:
    """Return the sampler that the arguments describe.

    Raises:
        InputError: If the prompts or the call cannot be read, or the device cannot be used.
    """
    from msfp.cli.call_json import call_from
    from msfp.pipelines.sampler import Sampler

    device(arguments)
    conditions = arguments.labels or _prompts(arguments.prompts)
    extra = call_from(arguments.call)
    if arguments.sampler_batch is None:
        arguments.sampler_batch = 1 if extra else 16
    return Sampler(
        steps=arguments.sampler_steps,
        batch=min(arguments.sampler_batch, arguments.count),
        conditions=tuple(conditions),
        guidance_scale=arguments.guidance_scale,
        extra=extra,
    )


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


def add_report(command: argparse.ArgumentParser) -> None:
    """Add the option for the report file."""
    command.add_argument(
        "--report", type=Path, metavar="FILE", help="a new .html file: one page with pictures"
    )


def add_state(command: argparse.ArgumentParser) -> None:
    """Add the option for the file that an interrupted run resumes from."""
    command.add_argument(
        "--state", type=Path, metavar="FILE",
        help="a .safetensors file: saved every minute for resuming, deleted on success",
    )  # fmt: skip


def add_resume(command: argparse.ArgumentParser) -> None:
    """Add the option that resumes an interrupted run."""
    command.add_argument("--resume", action="store_true", help="resume a run that was interrupted")


def state_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder of the state of a run, which is beside the output.

    Raises:
        InputError: If it exists and the run does not resume, or the other way round.
    """
    output: Path = arguments.output.absolute()
    folder = output.with_name(f"{output.name}.state")
    arguments.state = folder  # named in the message of an interruption
    if folder.exists() and not arguments.resume:
        raise InputError(
            f"{folder} belongs to an interrupted run: give --resume, or delete the folder"
        )
    if arguments.resume and not folder.is_dir():
        raise InputError(f"there is nothing to resume: {folder} does not exist")
    return folder


def check_files(arguments: argparse.Namespace, **suffixes: str) -> None:
    """Check the files that a command will write, where the arguments name them.

    Args:
        arguments: Arguments of the command.
        **suffixes: Required suffix of each file, by the name of its argument.
    """
    from msfp.support.files import check_new_file

    for argument, suffix in suffixes.items():
        path = getattr(arguments, argument)
        if path is not None and path != STANDARD_OUTPUT:
            check_new_file(argument, path, suffix)


def write_text(path: Path, text: str) -> None:
    """Write text to a file or to standard output."""
    from msfp.support.files import atomic_file

    if path == STANDARD_OUTPUT:
        print(text, end="")
        return
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
