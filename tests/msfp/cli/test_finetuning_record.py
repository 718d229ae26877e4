import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msfp import FinetuneConfig, InputError
from msfp.cli import finetuning_run
from msfp.cli.finetuning_record import (
    FIRST_FILE,
    KIND,
    FinetuningRecord,
    option_settings,
    settings_of_version_1,
)
from msfp.cli.main import main
from msfp.reports.finetuning_page import Row
from msfp.support.container import read

SETTINGS = {"--steps": 160, "--rates-norms": 2e-4, "--labels": (1, 2), "--clip": None}
KEPT = Path(__file__).parents[2] / "data" / "v0.2.0" / "finetuning"
FINETUNE = [
    *("--compare", "--sampler-steps", 3, "--sampler-batch", 4, "--count", 8, "--held-out", 4),
    *("--steps", 8, "--batch", 12, "--rank", 1, "--hub", 2, "--dfa-power", 1, "--accumulation", 2),
    *("--rates-norms", 0, "--rates-adapters", 0.002, "--rates-router", 0.002),
    *("--evaluate-every", 2, "--save-every", 4),
]
"""The settings that `make.py` gave to msfp 0.2.0, by the options that there are now."""


def row(name, best=2):
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Row(name, [0.25, 0.5], None, 20.5, images, 1.5, best)


def same_row(one, other):
    return one.to_dict() == other.to_dict() and torch.equal(one.images, other.images)


@pytest.fixture
def record(tmp_path):
    """A record of a training that has ended and of one that has not."""
    record = FinetuningRecord(tmp_path / "tuned.state", SETTINGS)
    record.begin()
    record.spent("single LoRA", 12.5)
    record.ended(row("single LoRA"))
    record.spent("hub of 2", 3.0)
    return record


def resumed(record, settings=SETTINGS):
    again = FinetuningRecord(record.folder, settings)
    again.resume()
    return again


def test_a_resumed_record_has_the_rows_and_the_time_of_what_was_kept(record):
    again = resumed(record)
    assert again.seconds == {"single LoRA": 12.5, "hub of 2": 3.0}
    assert same_row(again.row("single LoRA"), row("single LoRA"))
    assert again.row("hub of 2") is None
    again.ended(row("hub of 2", best=None))
    more = resumed(record)
    assert same_row(more.row("single LoRA"), row("single LoRA"))
    assert same_row(more.row("hub of 2"), row("hub of 2", best=None))


def test_nothing_kept_is_nothing_to_resume(tmp_path):
    (tmp_path / "tuned.state").mkdir()
    again = FinetuningRecord(tmp_path / "tuned.state", SETTINGS)
    again.resume()
    assert again.seconds == {}
    assert again.row("single LoRA") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--steps": 80}, "of another run: its --steps is 160, not 80"),
        ({"--labels": (2, 1)}, r"of another run: its --labels is \[1, 2\], not \[2, 1\]"),
        ({"--clip": 1.0}, "of another run: its --clip is None, not 1.0"),
        ({"--hub": 2}, "of another run: it has no --hub; this run has 2"),
    ],
)
def test_the_record_of_another_run_is_refused_by_what_differs(record, change, message):
    with pytest.raises(InputError, match=rf"run\.safetensors is a record of fine-tuning {message}"):
        resumed(record, SETTINGS | change)


def test_a_record_that_is_damaged_or_something_else_is_refused(record):
    file = record.folder / "run.safetensors"
    file.write_bytes(b"{")
    with pytest.raises(InputError, match=r"run\.safetensors cannot be read as a record of"):
        resumed(record)
    save_file({"images": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="must be a record of fine-tuning, but its metadata"):
        resumed(record)


def test_the_end_of_a_training_takes_its_state_away(record):
    state = record.state("hub of 2")
    state.write_text("state")
    record.ended(row("hub of 2"))
    assert [file.name for file in record.folder.iterdir()] == ["run.safetensors"]


def test_a_folder_is_kept_while_a_run_can_resume_from_it(record, tmp_path):
    record.discard_if_empty()  # which has a row
    assert record.folder.is_dir()
    begun = FinetuningRecord(tmp_path / "other.state", SETTINGS)
    begun.begin()
    begun.state("fine-tuned").write_text("state")
    begun.discard_if_empty()
    assert begun.folder.is_dir()
    begun.state("fine-tuned").unlink()
    begun.discard_if_empty()
    assert not begun.folder.exists()


def test_a_process_that_does_not_write_changes_nothing(record):
    before = {file: file.read_bytes() for file in record.folder.iterdir()}
    other = FinetuningRecord(record.folder, SETTINGS, writes=False)
    other.resume()
    other.spent("hub of 2", 100.0)
    other.ended(row("hub of 2"))
    other.discard()
    assert same_row(other.row("hub of 2"), row("hub of 2"))
    assert {file: file.read_bytes() for file in record.folder.iterdir()} == before


def test_options_of_a_config_are_those_of_the_command_line():
    settings = option_settings(FinetuneConfig(hub=2, rates={"norms": 0.0}, dfa_power=1.0))
    assert settings["--hub"] == 2
    assert settings["--rates-norms"] == 0.0
    assert settings["--dfa-power"] == 1.0
    assert not {"--rates", "--shard", "--guidance-branches", "--guidance-rows"} & settings.keys()


@pytest.fixture
def old(tmp_path):
    """The folder of a run that msfp 0.2.0 was interrupted in."""
    shutil.copytree(KEPT, tmp_path / "kept", ignore=shutil.ignore_patterns("make.py"))
    return tmp_path / "kept"


def resume(folder, *more):
    words = ["finetune", folder / "quantized", "--original", folder / "full", "--output"]
    return main([str(word) for word in (*words, folder / "tuned", *FINETUNE, "--resume", *more)])


@pytest.mark.slow
def test_a_run_of_0_2_0_is_resumed_where_it_was_and_ends_as_it_would_have(old, monkeypatch):
    """To the last bit on the machine that wrote it; others may round otherwise."""
    trained, told = finetuning_run.FinetuningRun.finetuned, []

    def spy(self, config, **options):
        pipe, history, seconds = trained(self, config, **options)
        told.append((options["resume"], len(history.losses)))
        return pipe, history, seconds

    monkeypatch.setattr(finetuning_run.FinetuningRun, "finetuned", spy)
    kept = json.loads((old / "tuned.state" / "run.json").read_text())
    assert resume(old) == 0
    assert told == [(True, 8), (False, 8), (False, 8)]  # one had ended, one had a state
    assert not (old / "tuned.state").exists()
    found = json.loads((old / "tuned" / "finetuning.json").read_text())
    expected = json.loads((old / "expected.json").read_text())
    assert found["rows"][1] == kept["rows"]["scales, biases and norms alone"]
    for one, other in zip(found["rows"], expected["rows"], strict=True):
        assert (one["name"], one["best"]) == (other["name"], other["best"])
        assert one["errors"] == pytest.approx(other["errors"], rel=1e-2)
        assert one["psnr"] == pytest.approx(other["psnr"], abs=0.1)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)


@pytest.mark.slow
def test_a_run_of_0_2_0_that_is_interrupted_again_is_resumed_from_the_new_record(old, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetuning_run, "finetune", interrupted)
        assert resume(old) == 130
    facts, images = read(old / "tuned.state" / "run.safetensors", KIND)
    assert list(facts.facts["rows"]) == list(images) == ["scales, biases and norms alone"]
    (old / "tuned.state" / FIRST_FILE).unlink()
    assert resume(old) == 0
    assert len(json.loads((old / "tuned" / "finetuning.json").read_text())["rows"]) == 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hub", "3"], "its --hub is 2, not 3"),
        (["--rates-norms", "0.1"], "its --rates-norms is 0.0, not 0.1"),
        (["--rates-biases", "0.1"], "its --rates-biases is 0.0002, not 0.1"),
        (["--dfa-power", "0"], "its --dfa-power is 1.0, not 0.0"),
        (["--accumulation", "1"], "its --accumulation is 2, not 1"),
        (["--lora-position", "beside"], "its --lora-position is inside, not beside"),
        (["--seed", "1"], "its --seed is 100, not 1"),
        (["--count", "12"], "its --count is 8, not 12"),
    ],
)
def test_a_run_of_0_2_0_is_not_resumed_with_other_settings(old, more, message, capsys):
    before = sorted(old.rglob("*"))
    assert resume(old, *more) == 2
    assert f"run.json belongs to another run: {message}" in capsys.readouterr().err
    assert sorted(old.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--initial": "svd"}, "its --initial is svd, which this run does not have"),
        ({"--student-every": 4}, "its --student-every is 4, which this run does not have"),
        ({"--temperature": [2.0]}, r"its --temperature is \[2.0, 2.0\], which this run does not"),
        ({"--temperature": [2.0, 0.5]}, r"its --temperature is \[2.0, 0.5\], which this run does"),
        ({"--routing": "denoiser"}, "routing must be one of .*, not 'denoiser'"),
        ({"--rate": ["norms"]}, "could not convert string to float"),
        ({"--place": None}, "lora_position must be one of"),
    ],
)
def test_a_run_of_0_2_0_with_an_option_that_is_gone_is_refused_by_it(changes, message, tmp_path):
    kept = json.loads((KEPT / "tuned.state" / FIRST_FILE).read_text())
    settings = settings_of_version_1(kept["facts"])
    file = tmp_path / FIRST_FILE
    file.write_text(json.dumps(kept | {"facts": kept["facts"] | changes, "rows": {}}))
    with pytest.raises(InputError, match=message):
        FinetuningRecord(tmp_path, settings).resume()
    file.write_text(json.dumps(kept | {"rows": {}}))
    FinetuningRecord(tmp_path, settings).resume()


def test_a_record_of_0_2_0_that_is_damaged_is_refused(old):
    kept, images = old / "tuned.state" / FIRST_FILE, "scales-biases-and-norms-alone.images"
    settings = settings_of_version_1(json.loads(kept.read_text())["facts"])
    (kept.parent / f"{images}.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"run\.json cannot be read as a record of fine-tuning"):
        FinetuningRecord(kept.parent, settings).resume()
    kept.write_text("{")
    with pytest.raises(InputError, match=r"run\.json cannot be read as a record of fine-tuning"):
        FinetuningRecord(kept.parent, settings).resume()


def test_settings_of_0_2_0_are_those_of_the_same_run_now():
    kept = json.loads((KEPT / "tuned.state" / FIRST_FILE).read_text())
    config = FinetuneConfig(
        hub=2,
        rank=1,
        steps=8,
        batch=12,
        dfa_power=1.0,
        accumulation=2,
        seed=100,
        rates={"norms": 0.0, "adapters": 0.002, "router": 0.002},
        evaluate_every=2,
        save_every=4,
    )
    found = settings_of_version_1(kept["facts"])
    assert {key: found[key] for key in option_settings(config)} == option_settings(config)
    assert len(asdict(config.rates)) == sum(key.startswith("--rates-") for key in found)
