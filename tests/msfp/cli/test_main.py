import json
import os
import re
import signal
import subprocess
import sys

import pytest
from diffusers import DDPMScheduler
from refusals import assert_refused

from msfp.cli.main import COMMANDS, main, parser
from msfp.experiments.demo import bench
from msfp.version import __version__


def run(*arguments, **options):
    command = [sys.executable, "-m", "msfp.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # noqa: S603


LIGHT = """
import sys
from msfp.cli.main import main

HEAVY = {"torch", "diffusers", "numpy", "rich", "transformers", "matplotlib"}
for words in WORDS:
    try:
        main(words.split())
    except SystemExit as stop:
        assert stop.code == (2 if words.endswith("typo") else 0), words
    heavy = HEAVY & {name.partition(".")[0] for name in sys.modules}
    assert not heavy, f"{words} imports {heavy}"
"""
"""Runs command lines in one process that must import nothing which takes long."""


def test_help_and_errors_of_usage_import_nothing_that_takes_long():
    names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
    told = ["--help", "--version", "--typo", "typo"]
    told += ["quantize digits --output x --weigth-bits typo"]
    told += [f"{name} {option}" for name in names for option in ("--help", "--typo")]
    code = LIGHT.replace("WORDS", repr(told))
    process = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("usage: ") == 1 + len(names)
    assert f"msfp {__version__}" in process.stdout


@pytest.mark.parametrize(
    ("whole", "short"),
    [
        (["quantize", "digits", "--output", "x", "--scheme", "signed"], "--schem"),
        (["quantize", "digits", "--output", "x", "--weight-bits", "4"], "--weight"),
        (["demo", "--quick"], "--qui"),
        (["finetune", "q", "--original", "f", "--output", "x", "--rates-norms", "0"], "--rates-n"),
    ],
)
def test_an_abbreviated_option_is_refused(whole, short, capsys):
    parser().parse_args(whole)
    cut = [short if short != word and word.startswith(short) else word for word in whole]
    assert cut != whole
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(cut)
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {short}" in capsys.readouterr().err


def test_output_that_nobody_reads_is_no_error(monkeypatch, tmp_path, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert main(["study", "--list", "--output", str(tmp_path / "study")]) == 1
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    process = run("demo", "--quick", "--output", folder)
    assert process.returncode == 0, process.stderr
    return folder, process


def rows_of(folder):
    results = json.loads((folder / "results.json").read_text())
    return {row["method"]: row for row in results["rows"]}


@pytest.mark.slow
def test_the_demo_orders_the_methods_by_their_errors(demo):
    errors = {name: row["noise_error"] for name, row in rows_of(demo[0]).items()}
    order = ["INT min-max", "INT MSE clip", "signed FP", "mixup-sign FP", "mixup-sign FP + LoRA"]
    values = [errors[name] for name in order]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    assert errors["mixup-sign FP + LoRA"] < errors["signed FP + LoRA"]
    assert errors["mixup-sign FP, refined"] < 0.3 * errors["mixup-sign FP"]
    for name in ("mixup-sign FP + TALoRA", "mixup-sign FP + TALoRA + DFA"):
        assert errors[name] < errors["mixup-sign FP"]


@pytest.mark.slow
def test_fine_tuning_brings_the_paired_images_back(demo):
    rows = rows_of(demo[0])
    assert rows["mixup-sign FP + LoRA"]["psnr"] > rows["mixup-sign FP"]["psnr"] + 2
    assert rows["full precision"]["noise_error"] < 1e-9


@pytest.mark.slow
def test_the_demo_counts_unsigned_layers_and_bytes(demo):
    rows = rows_of(demo[0])
    assert rows["signed FP"]["unsigned_layers"] == 0
    assert rows["mixup-sign FP"]["unsigned_layers"] == 35
    assert rows["mixup-sign FP"]["bytes"] < rows["full precision"]["bytes"] / 6


@pytest.mark.slow
def test_the_demo_prints_its_table_and_findings(demo):
    out = demo[1].stdout
    assert "noise" in out
    assert "…" not in out
    assert all(name in out for name in rows_of(demo[0]))
    assert re.search(r"(tie|beyond the seed)", out)


@pytest.mark.slow
def test_the_report_is_one_page_that_loads_nothing(demo):
    page = (demo[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r'(src|href)="(?!data:)', page)


@pytest.mark.slow
def test_the_demo_leaves_a_checkpoint_that_samples(demo, tmp_path):
    process = run("sample", demo[0] / "checkpoint", "--count", 8, "--steps", 2,
                  "--output", tmp_path / "grid.png")  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_interrupted_demo_writes_nothing(tmp_path, monkeypatch, capsys):
    search, interrupts = bench.quantize, iter([signal.SIGTERM])

    def interrupting(*arguments, **options):
        for number in interrupts:
            os.kill(os.getpid(), number)
        return search(*arguments, **options)

    monkeypatch.setattr(bench, "quantize", interrupting)
    assert main(["demo", "--quick", "--output", str(tmp_path / "out")]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def full_folder(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    return tmp_path / "full"


def no_denoiser(tmp_path):
    """A pipeline folder whose only component is a scheduler."""
    folder = tmp_path / "pipeline"
    DDPMScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "DiffusionPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def corrupt(tmp_path):
    (tmp_path / "model" / "unet").mkdir(parents=True)
    config = {"quantization_config": {"quant_method": "msfp"}}
    (tmp_path / "model" / "unet" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model_index.json").write_text("{}")
    return tmp_path / "model"


def no_json(tmp_path):
    (corrupt(tmp_path) / "unet" / "config.json").write_text("{")
    return tmp_path / "model"


def file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("kept")
    return tmp_path / "file" / "x" / "y"


BAD = {
    "bits": (
        lambda t: ["demo", "--weight-bits", "9", "--output", t / "x"],
        "weight_bits must be between 3 and 8, not 9",
    ),
    "seed": (
        lambda t: ["demo", "--seed", "-1", "--output", t / "x"],
        "expected one argument|range",
    ),
    "output": (lambda t: ["demo", "--output", full_folder(t)], "exists and is not empty"),
    "parent": (lambda t: ["demo", "--output", file_in_the_way(t)], "not a folder to write in"),
    "model": (lambda t: ["quantize", t, "--output", t / "x"], "it has no model_index.json"),
    "no denoiser": (
        lambda t: ["quantize", no_denoiser(t), "--output", t / "x"],
        "has no denoiser|cannot be loaded",
    ),
    "quantized": (lambda t: ["quantize", corrupt(t), "--output", t / "x"], "is quantized already"),
    "no json": (
        lambda t: ["quantize", no_json(t), "--output", t / "x"],
        "unet/config.json is not JSON",
    ),
    "steps": (
        lambda t: ["quantize", "digits", "--steps", "0", "--output", t / "x"],
        "whole number from 1 to 1000",
    ),
    "checkpoint": (
        lambda t: ["sample", t, "--output", t / "x.png"],
        "no component that is",
    ),
    "corrupt": (lambda t: ["sample", corrupt(t), "--output", t / "x.png"], "cannot be loaded"),
    "suffix": (lambda t: ["sample", corrupt(t), "--output", t / "x.jpg"], "must be a new .png"),
    "folder": (lambda t: ["sample", corrupt(t), "--output", t / "no/x.png"], "that exists"),
    "count": (
        lambda t: ["sample", t, "--count", "0", "--output", t / "x.png"],
        "whole number from 1 to 1000000",
    ),
    "scheme": (
        lambda t: ["quantize", "digits", "--scheme", "fp", "--output", t / "x"],
        "choose from",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_two(case, tmp_path, capsys):
    arguments, message = BAD[case]
    assert_refused(arguments(tmp_path), message, tmp_path, capsys)
