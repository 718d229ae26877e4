"""`msfp finetune`: bring a packed checkpoint back to its full-precision pipeline, by training."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from msfp.cli.commands import options
from msfp.errors import InputError
from msfp.layers.lora.routers import RouterKind
from msfp.training.config import (
    FinetuneConfig,
    Initial,
    LearningRates,
    Place,
    Precision,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from msfp.cli.finetuning_record import TuningRecord
    from msfp.cli.finetuning_run import Tuning
    from msfp.pipelines.sampler import Sampler
    from msfp.reports.finetuning_page import Row, TuningReport
    from msfp.training.state import History
    from msfp.training.trainer import Status

TABLE_WIDTH = 110
"""Columns that the table needs; a narrower terminal wraps its lines."""
REPORT, NUMBERS = "report.html", "finetuning.json"
RESULT = "fine-tuned"
"""Name of the training whose result is written."""
NO_SETTINGS = (
    "checkpoint", "command", "data", "device", "output", "prompts", "resume", "run", "shard",
    "state", "teacher", "tensorboard",
)  # fmt: skip
"""Arguments that a run may be resumed with others of, or that are told by what they name."""
GROUPS = tuple(field.name for field in dataclasses.fields(LearningRates))


def add(commands: Any) -> None:
    """Describe the command."""
    finetune = commands.add_parser(
        "finetune", help="train a quantized checkpoint towards its full-precision pipeline"
    )
    finetune.add_argument("checkpoint", type=Path, help="a folder of msfp quantize")
    finetune.add_argument(
        "--teacher", required=True, metavar="MODEL",
        help=f"the full-precision pipeline folder, or {options.REFERENCE!r}",
    )  # fmt: skip
    finetune.add_argument("--output", type=Path, required=True, help="a new folder")
    finetune.add_argument(
        "--resume", action="store_true", help="go on with a run that was interrupted"
    )
    finetune.add_argument(
        "--compare", action="store_true",
        help="train without each ingredient too, for the table of what it brought",
    )  # fmt: skip
    finetune.add_argument(
        "--data", type=Path, metavar="FOLDER",
        help="train on the images in it, noised, and not on samples of the sampler",
    )  # fmt: skip
    finetune.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="log there")
    _add_training(finetune)
    options.add_sampling(finetune, count=128, first_seed=100, training=True)
    finetune.add_argument(
        "--held-out", type=options.whole(2, 10**6), default=32,
        help="images whose trajectories are not trained on (default 32)",
    )  # fmt: skip
    finetune.set_defaults(run=run)


def _add_training(finetune: argparse.ArgumentParser) -> None:
    """Add what is trained and how."""
    count = options.whole(1, 10**9)
    group = finetune.add_argument_group("what is trained and how")
    for name, parse, default, text in (
        ("hub", options.whole(1, 16), 1, "LoRAs for each layer"),
        ("rank", options.whole(1, 256), 16, "rank of each"),
        ("steps", count, 160, "steps of training"),
        ("batch", count, 32, "samples in a step, over all processes"),
        ("accumulate", count, 1, "parts that a process takes its batch in"),
        ("student-every", options.whole(0, 10**9), 0, "steps between recordings of its own path"),
        ("evaluate-every", options.whole(0, 10**9), 40, "steps between held-out errors"),
        ("patience", options.whole(0, 10**9), 0, "held-out errors without a new best to stop at"),
        ("save-every", count, 50, "steps between saved states"),
    ):
        group.add_argument(
            f"--{name}", type=parse, default=default, metavar="N",
            help=f"{text} (default {default})",
        )  # fmt: skip
    numbers: tuple[tuple[str, float | None, str], ...] = (
        ("power", 0.0, "of the denoising factor in the loss: 1 is the paper's DFA"),
        ("ema", 0.0, "decay of the moving average that is the result"),
        ("clip", None, "largest norm of the gradient"),
    )
    for name, number, text in numbers:
        group.add_argument(f"--{name}", type=float, default=number, help=f"{text} ({number})")
    for name, choices, text in (
        ("routing", get_args(RouterKind), "what chooses among the LoRAs of a hub"),
        ("place", get_args(Place), "where LoRAs are: inside the quantizer or beside the weight"),
        ("initial", get_args(Initial), "what LoRAs begin as"),
        ("precision", get_args(Precision), "of mixed precision"),
    ):
        group.add_argument(
            f"--{name}", choices=choices, default=choices[0], help=f"{text} ({choices[0]})"
        )
    group.add_argument(
        "--rate", action="append", default=[], metavar="GROUP=VALUE",
        help=f"learning rate of {', '.join(GROUPS)}; 0 freezes a group; can be repeated",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=float, nargs="+", default=[1.0], metavar=("START", "END"),
        help="of a learned router's softmax, at the first step and at the last (1.0)",
    )  # fmt: skip
    group.add_argument(
        "--no-cache-teacher", dest="cache_teacher", action="store_false",
        help="ask the full-precision denoiser at each step, not for what was recorded",
    )  # fmt: skip
    group.add_argument("--checkpointing", action="store_true", help="save memory, cost time")
    group.add_argument("--shard", action="store_true", help="divide frozen weights among processes")


def run(arguments: argparse.Namespace) -> None:
    """Record, train, measure, and write a packed checkpoint with a report."""
    from msfp.cli.finetuning_run import Extent, Tuning, ladder
    from msfp.pipelines.denoiser import denoiser_of
    from msfp.support.files import check_folder, check_output
    from msfp.support.image_files import image_files
    from msfp.support.progress import stages

    check_output(arguments.output)
    config = _config(arguments)
    if arguments.tensorboard is not None:
        check_folder("tensorboard", arguments.tensorboard)
    if arguments.data is not None:
        image_files(arguments.data)
    sampler = options.check_sampling(arguments)
    arguments.state = _state_folder(arguments)
    _place_process(arguments)
    full = options.load_pipeline(arguments.teacher, arguments)
    quantized = options.load_checkpoint(arguments.checkpoint, arguments)
    record = _record(arguments, sampler)
    _meet_processes(full, config, arguments.tensorboard)
    extent = Extent(arguments.count, arguments.held_out, arguments.seed)
    with stages() as advance:
        tuning = Tuning(full, quantized, sampler, extent, advance, config, arguments.data)
        rows = [tuning.measured("quantized", quantized)]
    record.begin()
    try:
        for name, rung in ladder(config) if arguments.compare else []:
            rows.append(record.row(name) or _rung(tuning, name, rung, record, arguments))
        pipe, history, minutes = _trained(tuning, RESULT, config, record, arguments)
    finally:
        record.discard_if_empty()
    _meet_processes(full, config, None)  # none may still read what is removed at the end
    if not _main_process():
        return
    rows.append(tuning.measured(RESULT, pipe, minutes, history.best))
    kind = type(denoiser_of(pipe)).__name__
    title = f"{arguments.checkpoint.absolute().name} fine-tuned ({kind})"
    names = {key: str(getattr(arguments, key)) for key in ("checkpoint", "teacher")}
    report = tuning.report(title, names, config, rows, history, pipe)
    _write(report, pipe, arguments.output)
    record.discard()
    _print(report, arguments.output)


def _state_folder(arguments: argparse.Namespace) -> Path:
    """Return where the state of training is kept, beside the output."""
    output: Path = arguments.output.absolute()
    folder = output.with_name(f"{output.name}.state")
    if folder.exists() and not arguments.resume:
        raise InputError(
            f"{folder} is of a run that was interrupted: give --resume, or delete the folder"
        )
    if arguments.resume and not folder.is_dir():
        raise InputError(f"there is nothing to resume: {folder} does not exist")
    return folder


def _record(arguments: argparse.Namespace, sampler: Sampler) -> TuningRecord:
    """Return the record of the run, read where it is resumed."""
    from msfp.cli.finetuning_record import TuningRecord
    from msfp.support.image_files import listed

    settings = {key: value for key, value in vars(arguments).items() if key not in NO_SETTINGS}
    facts = {f"--{key.replace('_', '-')}": value for key, value in settings.items()}
    facts["--labels" if arguments.labels else "--prompts"] = sampler.conditions
    if arguments.data is not None:
        data = arguments.data.absolute()
        facts["--data"] = f"{data} with {listed(data)}"
    facts["checkpoint"] = _digest(arguments.checkpoint)
    record = TuningRecord(arguments.state, facts, writes=_main_process())
    if arguments.resume:
        record.resume()
    return record


def _digest(checkpoint: Path) -> str:
    """Return a few digits that tell checkpoints apart; the config has checksums of all tensors."""
    from msfp.checkpoint.io import CONFIG_FILE, quantized_component

    config = checkpoint / (quantized_component(checkpoint) or "") / CONFIG_FILE
    return hashlib.sha256(config.read_bytes()).hexdigest()[:12]


def _rates(words: list[str]) -> LearningRates:
    """Return learning rates, some of them given as GROUP=VALUE."""
    rates: dict[str, float] = {}
    for word in words:
        group, _, value = word.partition("=")
        try:
            rates[group] = float(value)
        except ValueError:
            rates[group] = -1.0
        if group not in GROUPS or rates[group] < 0:
            raise InputError(
                f"rate must be GROUP=VALUE, a group among {', '.join(GROUPS)} and a number from "
                f"0 to 1, not {word!r}"
            )
    return LearningRates(**rates)


def _config(arguments: argparse.Namespace) -> FinetuneConfig:
    start, *end = arguments.temperature
    return FinetuneConfig(
        hub=arguments.hub,
        rank=arguments.rank,
        steps=arguments.steps,
        batch=arguments.batch,
        rates=_rates(arguments.rate),
        denoising_power=arguments.power,
        seed=arguments.seed,
        routing=arguments.routing,
        place=arguments.place,
        initial=arguments.initial,
        temperature=(start, *(end or [start])),
        accumulation=arguments.accumulate,
        clip=arguments.clip,
        ema=arguments.ema,
        precision=arguments.precision,
        checkpointing=arguments.checkpointing,
        shard=arguments.shard,
        cache_teacher=arguments.cache_teacher,
        student_every=arguments.student_every,
        evaluate_every=arguments.evaluate_every,
        patience=arguments.patience,
        save_every=arguments.save_every,
    )


def _place_process(arguments: argparse.Namespace) -> None:
    """Give each process of `accelerate launch` a GPU of its own."""
    import torch

    if arguments.device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"


def _main_process() -> bool:
    """Return whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def _meet_processes(
    full: DiffusionPipeline, config: FinetuneConfig, tensorboard: Path | None
) -> None:
    """Wait for all processes of `accelerate launch`; refuse what none of them can have."""
    from msfp.pipelines.denoiser import denoiser_of
    from msfp.training.processes import accelerator

    device = next(denoiser_of(full).parameters()).device
    accelerator(device, config.precision, tensorboard).wait_for_everyone()


def _rung(
    tuning: Tuning,
    name: str,
    config: FinetuneConfig,
    record: TuningRecord,
    arguments: argparse.Namespace,
) -> Row:
    """Train without some ingredients; keep what was measured."""
    pipe, history, minutes = _trained(tuning, name, config, record, arguments)
    row = tuning.measured(name, pipe, minutes, history.best)
    record.ended(row)
    return row


def _trained(
    tuning: Tuning,
    name: str,
    config: FinetuneConfig,
    record: TuningRecord,
    arguments: argparse.Namespace,
) -> tuple[DiffusionPipeline, History, float]:
    """Train with a progress bar, on from where the record is; return the minutes of all of it."""
    from msfp.support.progress import noted_bar

    state = record.state(name)
    before, started = record.seconds.get(name, 0.0), time.monotonic()
    with noted_bar(f"training: {name}") as advance:

        def progress(status: Status) -> None:
            error = "" if status.error is None else f", held-out error {status.error:.3g}"
            advance(status.step, status.steps, f"loss {status.loss:.3g}{error}")
            if status.step % config.save_every == 0 or status.step == status.steps:
                record.spent(name, before + time.monotonic() - started)

        pipe, history, seconds = tuning.tuned(
            config,
            file=state,
            resume=state.is_file(),
            tensorboard=arguments.tensorboard if name == RESULT else None,
            progress=progress,
        )
    return pipe, history, (before + seconds) / 60


def _write(report: TuningReport, pipe: Any, output: Path) -> None:
    """Write the checkpoint and the report into one folder."""
    from msfp.checkpoint.io import save
    from msfp.support.files import atomic_folder

    with atomic_folder(output) as folder:
        save(pipe, folder)
        (folder / REPORT).write_text(report.html(), encoding="utf-8")
        (folder / NUMBERS).write_text(json.dumps(report.to_dict(), indent=1) + "\n")


def _print(report: TuningReport, output: Path) -> None:
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
