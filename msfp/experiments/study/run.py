"""Running the missing rows of a study, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from msfp.checkpoint.migrations import REFINEMENT_BEFORE
from msfp.config import QuantizationConfig, RefinementConfig
from msfp.errors import InputError
from msfp.experiments.study.ablation import RECIPES, REVISION, Row, all_rows
from msfp.experiments.study.bench import Bench
from msfp.experiments.study.benchmark_models import BENCHMARK_MODELS, model_folder
from msfp.experiments.study.store import Record, Store
from msfp.reports.figures import save_image_grid
from msfp.support.progress import Progress, counted, no_progress
from msfp.training.config import FinetuneConfig

SHOWN = 12
"""Number of images that are kept of a row with seed 0."""


def chosen_rows(globs: Sequence[str]) -> list[Row]:
    """Return the rows whose names match any of the globs.

    Raises:
        InputError: If a glob matches none.

    Example:
        >>> [row.name for row in chosen_rows(["digits-ddpm/0/mixup/W4A4/ddim-20/[01]"])]
        ['digits-ddpm/0/mixup/W4A4/ddim-20/0', 'digits-ddpm/0/mixup/W4A4/ddim-20/1']
    """
    rows = all_rows()
    for glob in globs:
        if not any(fnmatchcase(row.name, glob) for row in rows):
            raise InputError(
                f"rows {glob!r} matches none of the {len(rows)} rows, such as {rows[0].name}"
            )
    return [row for row in rows if any(fnmatchcase(row.name, glob) for glob in globs)]


def missing_rows(rows: Sequence[Row], store: Store) -> list[Row]:
    """Return the rows that have no record, or only a record of other settings."""
    records = store.records()
    return [row for row in rows if not _is_of(records.get(row.name), row)]


def valid_records(store: Store) -> list[Record]:
    """Return the records that are valid for their present rows, and those of retired recipes."""
    rows = {row.name: row for row in all_rows()}
    records = store.records().items()
    return [
        each
        for name, each in records
        if _is_retired(each) or (name in rows and _is_of(each, rows[name]))
    ]


def _is_retired(record: Record) -> bool:
    """Return whether a record is of a recipe that this version cannot run."""
    recipe = RECIPES.get(record["row"]["recipe"])
    return recipe is not None and bool(recipe.retired)


def _is_of(record: Record | None, row: Row) -> bool:
    """Return whether a record has the revision and settings that a row has now."""
    if record is None or record.get("revision", 1) != REVISION:
        return False
    model = BENCHMARK_MODELS[row.model]
    quantization, tuning = row.quantization(), model.finetune(row)
    wanted = {
        "settings": asdict(model.settings),
        "quantization": None if quantization is None else quantization.to_dict(),
        "finetune": None if tuning is None else tuning.to_dict(),
    }
    found = record | {
        "quantization": _completed(record["quantization"], QuantizationConfig().to_dict()),
        "finetune": _completed(record["finetune"], FinetuneConfig().to_dict()),
    }
    if found["quantization"] is not None:
        defaults = RefinementConfig().to_dict() | REFINEMENT_BEFORE
        refine = _completed(found["quantization"]["refine"], defaults)
        found["quantization"] |= {"refine": refine}
    return all(found[key] == _plain(value) for key, value in wanted.items())


def _completed(given: Any, default: dict[str, Any]) -> Any:
    """Return a config with the defaults of fields that are newer than it; others as they are."""
    return _plain(default) | given if isinstance(given, dict) else given


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def run_rows(
    rows: Sequence[Row],
    folder: Path,
    trained: Path | None,
    progress: Progress = no_progress,
) -> None:
    """Run rows and append their records, each as soon as it is measured.

    Args:
        rows: Rows to run, in the order of `all_rows`.
        folder: Folder of the records and pictures.
        trained: Folder of independently trained models, or None.
        progress: Called after each row.

    Raises:
        InputError: If a full-precision model is missing; in that case no row is run.
    """
    for model, training in dict.fromkeys((row.model, row.training) for row in rows):
        model_folder(model, training, trained)
    store, bench, key = Store(folder), None, None
    done = counted(progress, "rows", len(rows))
    for row in rows:
        if bench is None or key != Bench.key(row):
            bench, key = Bench(row, trained), Bench.key(row)
        record, images = bench.run(row)
        if row.seed == 0:
            file = picture_file(folder, row.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_image_grid(images[:SHOWN], file, columns=SHOWN)
        store.append(record)
        done(1)


def picture_file(folder: Path, name: str) -> Path:
    """Return the file of a row's images."""
    return folder / "images" / f"{name}.png"
