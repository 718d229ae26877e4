"""`msfp finetune`: train a packed checkpoint towards its full-precision pipeline."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msfp.cli import options
from msfp.cli.config_options import add_config, config_from
from msfp.cli.loading import NAMED, load_checkpoint, load_pipeline
from msfp.training.config import FinetuneConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from msfp.cli.finetuning_record import FinetuningRecord
    from msfp.cli.finetuning_run import FinetuningRun
    from msfp.pipelines.sampler import Sampler
    from msfp.reports.finetuning_page import FinetuningReport, Row
    from msfp.support.progress import Progress
    from msfp.training.state import History

TABLE_WIDTH = 110
"""Columns that the table needs; a narrower terminal wraps its lines."""
REPORT, NUMBERS = "report.html", "finetuning.json"
RESULT = "fine-tuned"
"""Name of the training whose result is written."""
CALLED = (
    "count", "sampler_steps", "sampler_batch", "guidance_scale", "sampler", "seed", "dtype",
    "held_out", "compare",
)  # fmt: skip
"""Arguments, in addition to the config, that must be equal for a run to resume."""


def add(commands: Any) -> None:
    """Describe the command."""
    finetune = commands.add_parser(
        "finetune", help="train a quantized checkpoint towards its full-precision pipeline"
    )
    finetune.add_argument("checkpoint", type=Path, help="a folder of msfp quantize")
    finetune.add_argument(
        "--original", required=True, metavar="MODEL",
        help=f"the full-precision pipeline folder, or {NAMED}",
    )  # fmt: skip
    finetune.add_argument("--output", type=Path, required=True, help="a new folder")
    options.add_resume(finetune)
    finetune.add_argument(
        "--compare", action="store_true",
        help="also train simpler configs, for an ablation table",
    )  # fmt: skip
    finetune.add_argument(
        "--data", type=Path, metavar="FOLDER",
        help="train on the images in it, noised, and not on samples of the sampler",
    )  # fmt: skip
    finetune.add_argument(
        "--component", metavar="NAME", help="the denoiser to train, where a pipeline has several"
    )
    finetune.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="log there")
    add_config(
        finetune, FinetuneConfig, "what is trained, and how",
        skip=("seed", "guidance_branches", "guidance_rows"), defaults={"evaluate_every": 40},
    )  # fmt: skip
    options.add_sampling(finetune, count=128, first_seed=100, training=True)
    finetune.add_argument(
        "--held-out", type=options.whole(2, 10**6), default=32, metavar="N",
        help="images whose trajectories are not trained on (default: 32)",
    )  # fmt: skip
    finetune.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Record, train, measure, and write a packed checkpoint with a report."""
    from msfp.cli.finetuning_run import Extent, FinetuningRun, ablation
    from msfp.pipelines.denoiser import denoiser_of, select_denoisers
    from msfp.support.progress import progress_bars

    config = _checked(arguments)
    sampler = options.check_sampling(arguments)
    folder = options.state_folder(arguments)
    _place_process(arguments)
    original = load_pipeline(arguments.original, arguments)
    quantized = load_checkpoint(arguments.checkpoint, arguments)
    if arguments.component is not None:
        original, quantized = (
            select_denoisers(each, arguments.component) for each in (original, quantized)
        )
    record = _record(arguments, folder, config, sampler)
    _meet_processes(original, config, arguments.tensorboard)
    extent = Extent(arguments.count, arguments.held_out, arguments.seed)
    with progress_bars() as progress:
        tuning = FinetuningRun(
            original, quantized, sampler, extent, config, arguments.data, progress
        )
        rows = [tuning.measured("quantized", quantized)]
        record.begin()
        try:
            for name, part in ablation(config) if arguments.compare else []:
                rows.append(record.row(name) or _measured(tuning, name, part, record, progress))
            logs = arguments.tensorboard
            pipe, history, minutes = _trained(tuning, RESULT, config, record, progress, logs)
        finally:
            record.discard_if_empty()
        # Wait until no process reads the state, which is removed below.
        _meet_processes(original, config, None)
        if not _main_process():
            return
        rows.append(tuning.measured(RESULT, pipe, minutes, history.best))
    kind = type(denoiser_of(pipe)).__name__
    title = f"{arguments.checkpoint.absolute().name} fine-tuned ({kind})"
    names = {key: str(getattr(arguments, key)) for key in ("checkpoint", "original")}
    report = tuning.report(title, names, config, rows, history, pipe)
    _write(report, pipe, arguments.output)
    record.discard()
    _print(report, arguments.output)


def _checked(arguments: argparse.Namespace) -> FinetuneConfig:
    """Check all arguments that can be checked before anything is loaded; return the config."""
    from msfp.support.files import check_folder, check_output
    from msfp.support.image_files import image_files

    check_output(arguments.output)
    config = config_from(arguments, FinetuneConfig, seed=arguments.seed)
    if arguments.tensorboard is not None:
        check_folder("tensorboard", arguments.tensorboard)
    if arguments.data is not None:
        image_files(arguments.data)
    return config


def _record(
    arguments: argparse.Namespace, folder: Path, config: FinetuneConfig, sampler: Sampler
) -> FinetuningRecord:
    """Return the record of the run; if the run resumes, read the record from its folder."""
    from msfp.cli.finetuning_record import FinetuningRecord, option_settings
    from msfp.support.image_files import listed

    settings = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in CALLED}
    settings |= option_settings(config)
    settings["--labels" if arguments.labels else "--prompts"] = sampler.conditions
    if arguments.data is not None:
        data = arguments.data.absolute()
        settings["--data"] = f"{data} with {listed(data)}"
    settings["checkpoint"] = _digest(arguments.checkpoint)
    record = FinetuningRecord(folder, settings, writes=_main_process())
    if arguments.resume:
        record.resume()
    return record


def _digest(checkpoint: Path) -> str:
    """Return a short hash of a checkpoint's config, which holds checksums of all tensors."""
    from msfp.checkpoint.inspection import network_folders
    from msfp.checkpoint.io import CONFIG_FILE

    found = hashlib.sha256()
    for folder in network_folders(checkpoint).values():
        found.update((folder / CONFIG_FILE).read_bytes())
    return found.hexdigest()[:12]


def _place_process(arguments: argparse.Namespace) -> None:
    """Give each process of `accelerate launch` its own GPU."""
    import torch

    if arguments.device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"


def _main_process() -> bool:
    """Return whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def _meet_processes(
    original: DiffusionPipeline, config: FinetuneConfig, tensorboard: Path | None
) -> None:
    """Wait for all processes of `accelerate launch`; refuse options that they cannot use."""
    from msfp.pipelines.denoiser import denoiser_of
    from msfp.training.processes import accelerator

    device = next(denoiser_of(original).parameters()).device
    accelerator(device, config.precision, tensorboard).wait_for_everyone()


def _measured(
    tuning: FinetuningRun,
    name: str,
    config: FinetuneConfig,
    record: FinetuningRecord,
    progress: Progress,
) -> Row:
    """Train with one config of the ablation; measure the result and record its row."""
    pipe, history, minutes = _trained(tuning, name, config, record, progress)
    row = tuning.measured(name, pipe, minutes, history.best)
    record.ended(row)
    return row


def _trained(
    tuning: FinetuningRun,
    name: str,
    config: FinetuneConfig,
    record: FinetuningRecord,
    progress: Progress,
    tensorboard: Path | None = None,
) -> tuple[DiffusionPipeline, History, float]:
    """Train or resume; return the pipeline, the history and the minutes over all runs."""
    state = record.state(name)
    before, started = record.seconds.get(name, 0.0), time.monotonic()

    def tell(_stage: str, done: int, total: int, note: str = "", /) -> None:
        progress(f"training: {name}", done, total, note)
        if done % config.save_every == 0 or done == total:
            record.spent(name, before + time.monotonic() - started)

    pipe, history, seconds = tuning.finetuned(
        config, state=state, resume=state.is_file(), tensorboard=tensorboard, progress=tell
    )
    return pipe, history, (before + seconds) / 60


def _write(report: FinetuningReport, pipe: Any, output: Path) -> None:
    """Write the checkpoint and the report into one folder."""
    from msfp.checkpoint.io import save
    from msfp.support.files import atomic_folder

    with atomic_folder(output) as folder:
        save(pipe, folder)
        (folder / REPORT).write_text(report.html(), encoding="utf-8")
        (folder / NUMBERS).write_text(json.dumps(report.to_dict(), indent=1) + "\n")


def _print(report: FinetuningReport, output: Path) -> None:
    """Print the table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from msfp.reports.finetuning_page import COLUMNS

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if not column else "right")
    for row in report.rows:
        table.add_row(*row.cells())
    console = Console()
    Console(width=max(console.width, TABLE_WIDTH)).print(table)
    for note in report.notes():
        print(note)
    print(f"Fine-tuned: {output}; report: {output / REPORT}")
