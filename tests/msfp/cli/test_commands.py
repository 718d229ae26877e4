import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from families import pipeline
from refusals import assert_refused
from safetensors.torch import load_file, save_file

from msfp import Calibration, InputError, inspect_layers, load
from msfp.checkpoint.inspection import inspect_products
from msfp.cli.main import main
from msfp.evaluation.image_metrics import ImageMetrics
from msfp.layers.attention import OPERANDS

QUICK = ("--steps", 2, "--count", 4, "--batch", 4)


def msfp(*arguments):
    return main([str(word) for word in arguments])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A checkpoint of the reference model, the report on it and its calibration."""
    folder = tmp_path_factory.mktemp("digits")
    code = msfp(
        "quantize", "digits", *QUICK, "--output", folder / "model", "--report", folder / "q.html",
        "--calibration", folder / "c.safetensors", "--refine", "none",
    )  # fmt: skip
    assert code == 0
    return folder


@pytest.mark.parametrize(
    ("family", "words"),
    [
        pytest.param(
            "conditional_unet",
            ("--prompts", "prompts.txt", "--guidance-scale", 3),
            marks=pytest.mark.slow,
        ),
        ("dit", ("--labels", 1, 2, 3)),
        ("unet", ()),
    ],
)
def test_a_pipeline_is_taken_all_the_way(family, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline(family, tmp_path / "vocabulary").save_pretrained("plain")
    (tmp_path / "prompts.txt").write_text("a\n\na a a\n")
    refine = ("--bits-per-weight", 9) if family == "dit" else ("--refine", "none")
    assert msfp("quantize", "plain", *QUICK, *words, *refine, "--output", "packed") == 0
    assert msfp("sample", "packed", *QUICK, *words, "--output", "grid.png") == 0
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    report = ("--report", "e.html") if family == "conditional_unet" else ()
    code = msfp("evaluate", "packed", "--original", "plain", *QUICK, *words, "--json", "e.json",
                *report)  # fmt: skip
    assert code == 0
    told = capsys.readouterr().out
    assert "Frechet distance (pixels)" in told
    assert ("<- budget" in told) is (family == "dit")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["count"] == 4
    assert found["noise_error"] > 0
    assert found["conditions"] == {"dit": [1, 2, 3], "unet": []}.get(family, ["a", "a a a"])
    assert len(found["layers"]) == len(inspect_layers("packed"))
    if report:
        assert "data:image/png;base64," in (tmp_path / "e.html").read_text()


def test_quantize_says_what_it_did_and_reports(digits):
    assert len(inspect_layers(digits / "model")) == 65
    assert (digits / "model" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    page = (digits / "q.html").read_text()
    assert "digits at W4A4" in page
    assert page.count("data:image/png;base64,") == 1 + 2 * 4


def test_a_kept_calibration_is_not_made_again(digits, tmp_path, capsys):
    before = (digits / "c.safetensors").read_bytes()
    code = msfp(
        "quantize", "digits", *QUICK, "--output", tmp_path / "again", "--calibration",
        digits / "c.safetensors", "--weight-bits", 5, "--end-bits", 5, "--scheme", "signed",
        "--exclude", "time_embedding", "--exclude", "*.to_q", "--refine", "none",
        "--granularity", "tensor",
    )  # fmt: skip
    assert code == 0
    assert (digits / "c.safetensors").read_bytes() == before
    facts = inspect_layers(tmp_path / "again")
    names = {each.layer for each in facts}
    assert "0 with unsigned inputs" in capsys.readouterr().out
    assert not any(name.startswith("time_embedding") or name.endswith("to_q") for name in names)
    assert {each.weight.bits for each in facts} == {5}
    assert load(tmp_path / "again")


@pytest.mark.slow
def test_refined_weights_predict_better(digits, tmp_path):
    code = msfp("quantize", "digits", *QUICK, "--output", tmp_path / "refined",
                "--calibration", digits / "c.safetensors")  # fmt: skip
    assert code == 0
    errors = {}
    for name, folder in (("nearest", digits / "model"), ("refined", tmp_path / "refined")):
        file = tmp_path / f"{name}.json"
        assert msfp("evaluate", folder, "--original", "digits", *QUICK, "--json", file) == 0
        errors[name] = json.loads(file.read_text())["noise_error"]
    assert errors["refined"] < 0.8 * errors["nearest"]


def test_weights_alone_take_no_calibration(tmp_path):
    code = msfp("quantize", "digits", "--activation-bits", "none", "--include", "mid_block",
                "--end-bits", 4, "--refine", "none", "--output", tmp_path / "w4")  # fmt: skip
    assert code == 0
    facts = inspect_layers(tmp_path / "w4")
    assert all(each.layer.startswith("mid_block.") and each.input is None for each in facts)


def test_block_formats_are_written_sampled_and_inspected(tmp_path, capsys):
    code = msfp("quantize", "digits", "--scheme", "nvfp4", "--refine", "none",
                "--output", tmp_path / "nvfp4", "--report", tmp_path / "r.html")  # fmt: skip
    assert code == 0
    assert "NVFP4" in (tmp_path / "r.html").read_text()
    assert msfp("sample", tmp_path / "nvfp4", *QUICK, "--output", tmp_path / "grid.png") == 0
    capsys.readouterr()
    assert msfp("inspect", tmp_path / "nvfp4", "--filter", "conv_*") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "conv_" in line]
    assert [line.split()[1] for line in lines[:2]] == ["MXINT8", "MXINT8"]
    assert lines[2:] == [
        "In floating point: conv_in, conv_out (block formats have a scale for each block)."
    ]
    assert all(
        each.formats.input == each.formats.weight for each in inspect_layers(tmp_path / "nvfp4")
    )


def test_inspect_prints_whole_lines(digits, capsys):
    assert msfp("inspect", digits / "model", "--sort", "input_sqnr", "--filter", "*.conv2") == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if ".conv2" in line]
    assert len(rows) == 11
    assert "…" not in out
    assert re.search(r"11 layers, [\d,]+ bytes; weights: 11 at 4 bits; inputs: 11 unsigned", out)
    facts = {each.layer: each for each in inspect_layers(digits / "model")}
    quality = [facts[row[0]].input_sqnr for row in rows]
    assert quality == sorted(quality)


@pytest.fixture(scope="module")
def with_products(digits):
    """A checkpoint whose attention products are quantized to 5 bits."""
    code = msfp(
        "quantize", "digits", *QUICK, "--attention-bits", 5, "--refine", "none",
        "--activation-bits", "none", "--output", digits / "products",
        "--report", digits / "products.html",
    )  # fmt: skip
    assert code == 0
    return digits / "products"


def test_products_of_attention_are_quantized_and_inspected(with_products, capsys):
    products = {each.layer: each for each in inspect_products(with_products)}
    assert products
    assert all(each.format.bits == 5 for each in products.values())
    module = load(with_products).unet.mid_block.attentions[0].products
    for operand in OPERANDS:
        each = products[f"mid_block.attentions.0.products.{operand}"]
        wide = module[operand](torch.tensor([-1e9, 1e9]))
        assert wide.tolist() == pytest.approx(each.clip, rel=1e-6)
        assert each.bytes == sum(t.nbytes for t in module[operand].state_dict().values())
    capsys.readouterr()
    assert msfp("inspect", with_products, "--filter", "mid_block.attentions.0") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if ".products." in line]
    assert [line[:2] for line in lines] == [
        [name, str(each.format)] for name, each in products.items() if name.startswith("mid_block")
    ]
    assert msfp("inspect", with_products, "--filter", "*.probabilities") == 0
    assert "weights" not in capsys.readouterr().out
    page = (with_products.parent / "products.html").read_text()
    assert all(name in page for name in products)


def test_products_of_attention_are_rows_of_json_and_csv(with_products, capsys):
    products = inspect_products(with_products)
    assert msfp("inspect", with_products, "--json", "-") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 65 + len(products)
    assert msfp("inspect", with_products, "--csv", "-") == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(lines) == len(rows)
    for row, line, each in zip(rows[65:], lines[65:], products, strict=True):
        assert row["input_format"] == line["input_format"] == str(each.format)
        assert row["input_scale"] == float(line["input_scale"]) == each.scale > 0
        assert row["zero_point"] == each.zero_point
        assert line["weight_format"] == ""


def test_a_layer_that_was_damaged_is_named_by_inspect(with_products, tmp_path):
    shutil.copytree(with_products, tmp_path / "damaged")
    file = tmp_path / "damaged" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["mid_block.attentions.0.products.key.scale"]
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"cannot be read.*products\.key\.scale"):
        inspect_products(tmp_path / "damaged")


def test_inspect_writes_json_and_csv(digits, tmp_path, capsys):
    assert msfp("inspect", digits / "model", "--json", "-") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["layer"] == "conv_in"
    assert rows[0]["weight_choices"]
    assert msfp("inspect", digits / "model", "--csv", "-", "--sort", "layer") == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    by_name = {row["layer"]: row for row in rows}
    assert [line["layer"] for line in lines] == sorted(by_name)
    for line in lines:
        for key, text in line.items():
            value = by_name[line["layer"]][key]
            assert text == ("" if value is None else str(value))
    files = ("--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv")
    assert msfp("inspect", digits / "model", *files) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == rows


def test_evaluate_writes_json_alone_to_standard_output(digits, capsys):
    code = msfp("evaluate", digits / "model", "--original", "digits", *QUICK, "--sampler", "dpm++",
                "--json", "-")  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["features"] == "digits"
    assert found["timesteps"] == [999, 499]


def test_an_interrupted_evaluation_resumes_from_its_state(digits, tmp_path, monkeypatch):
    state, file = tmp_path / "e.safetensors", tmp_path / "e.json"
    words = ("evaluate", digits / "model", "--original", "digits", "--steps", 2, "--count", 6,
             "--batch", 2, "--json", file, "--state", state)  # fmt: skip
    updates = []
    update = ImageMetrics.update

    def stopped_at_the_second(self, sets):
        updates.append(len(sets.full))
        if len(updates) == 2:
            raise KeyboardInterrupt
        update(self, sets)

    monkeypatch.setattr(ImageMetrics, "update", stopped_at_the_second)
    monkeypatch.setattr("msfp.support.autosave.SAVE_SECONDS", 0)
    monkeypatch.setattr("msfp.support.autosave.SAVE_SHARE", math.inf)
    assert msfp(*words) == 130
    assert [each.name for each in tmp_path.iterdir()] == [state.name]
    assert msfp(*words) == 0
    assert updates == [2] * (2 + 2)
    assert json.loads(file.read_text())["count"] == 6
    assert not state.exists()


@pytest.mark.slow
def test_an_interrupted_calibration_resumes_from_its_file(tmp_path):
    state = tmp_path / "c.safetensors"
    words = ("quantize", "digits", "--steps", "3", "--count", "400", "--batch", "2",
             "--output", tmp_path / "model", "--calibration", state)  # fmt: skip
    command = [sys.executable, "-m", "msfp.cli.main", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603
    started = time.monotonic()
    while not state.exists() and time.monotonic() < started + 120:
        time.sleep(0.1)
    time.sleep(0.15 * (time.monotonic() - started))  # some calls, on a slow machine as well
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "c.safetensors are saved" in stderr
    assert "Traceback" not in stderr
    kept = Calibration.load(state)
    assert kept.total == 200
    assert 0 < len(kept.calls) < 200
    assert {file.name for file in tmp_path.iterdir()} == {"c.safetensors", "model.state"}


@pytest.mark.slow
def test_a_quantization_that_is_killed_again_and_again_ends_with_the_same_file(tmp_path):
    words = ["quantize", "digits", "--steps", 3, "--count", 32, "--batch", 4, "--offload"]
    command = [sys.executable, "-m", "msfp.cli.main", *map(str, words), "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)  # noqa: S603
    assert [file.name for file in tmp_path.iterdir()] == ["whole"]
    output, more, kills = tmp_path / "killed", [], 0
    while not output.exists():
        process = subprocess.Popen(  # noqa: S603
            [*command, str(output), *more], stderr=subprocess.PIPE
        )
        started, kept = time.monotonic(), count_files(tmp_path)
        while process.poll() is None and time.monotonic() < started + 240:
            # Killed after some more files, at a moment that differs from run to run.
            if count_files(tmp_path) > kept + 25:
                process.kill()
                kills += 1
            time.sleep(0.05)
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        more = ["--resume"]
    assert kills > 2
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "killed"}
    name = "unet/diffusion_pytorch_model.safetensors"
    one, other = (load_file(tmp_path / folder / name) for folder in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def count_files(folder):
    names = (name for _, _, names in os.walk(folder / "killed.state") for name in names)
    return sum(name.endswith(".safetensors") for name in names)


def test_a_state_needs_a_word_to_resume_from_it_and_a_run_to_have_left_it(tmp_path, capsys):
    words = ["quantize", "digits", *QUICK, "--output", tmp_path / "new"]
    assert msfp(*words, "--resume") == 2
    assert "there is nothing to resume" in capsys.readouterr().err
    (tmp_path / "new.state").mkdir()
    assert msfp(*words) == 2
    assert "give --resume, or delete the folder" in capsys.readouterr().err


def test_calls_that_a_file_has_seen_are_recorded_all_the_same(tmp_path):
    pipeline("unet", tmp_path).save_pretrained(tmp_path / "plain")
    words = ["quantize", tmp_path / "plain", *QUICK, "--calibration", tmp_path / "c.safetensors",
             "--include", "mid_block", "--end-bits", 4]  # fmt: skip
    packed = []
    for name in ("first", "second"):
        assert msfp(*words, "--output", tmp_path / name) == 0
        file = tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors"
        packed.append(load_file(file))
    assert packed[0].keys() == packed[1].keys()
    assert all(torch.equal(tensor, packed[1][name]) for name, tensor in packed[0].items())


def test_a_calibration_by_other_labels_or_guidance_is_refused(tmp_path, capsys):
    pipeline("dit", tmp_path).save_pretrained(tmp_path / "plain")
    words = ["quantize", tmp_path / "plain", *QUICK, "--refine", "none", "--calibration",
             tmp_path / "c.safetensors", "--labels", 1, 2]  # fmt: skip
    assert msfp(*words, "--output", tmp_path / "packed") == 0
    words += ["--output", tmp_path / "x"]
    for more, message in (
        (["--labels", 2, 1], r"different calls: labels \[2, 1\] and \[1, 2\]"),
        (["--guidance-scale", 2], "different calls: guidance scale 2.0 and none"),
    ):
        assert_refused([*words, *more], message, tmp_path, capsys)


def text_to_image(tmp_path):
    pipeline("conditional_unet", tmp_path / "vocabulary").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def classes(tmp_path):
    pipeline("dit", tmp_path).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def written(tmp_path, text):
    (tmp_path / "file").write_text(text)
    return tmp_path / "file"


BAD = {
    "no prompts": (
        lambda t, _: ["quantize", text_to_image(t), "--output", t / "x"],
        "StableDiffusionPipeline is conditional: prompts must be given",
    ),
    "labels for text": (
        lambda t, _: ["quantize", text_to_image(t), "--labels", 1, "--output", t / "x"],
        "takes prompts, not 1",
    ),
    "prompts for classes": (
        lambda t, _: ["quantize", classes(t), "--prompts", written(t, "a"), "--output", t / "x"],
        "DiTPipeline takes labels, not 'a'",
    ),
    "prompts for digits": (
        lambda t, _: ["quantize", "digits", "--prompts", written(t, "a"), "--output", t / "x"],
        "DDIMPipeline is unconditional",
    ),
    "empty prompts": (
        lambda t, _: ["quantize", "digits", "--prompts", written(t, "\n \n"), "--output", t / "x"],
        "must hold a prompt in at least one line",
    ),
    "absent prompts": (
        lambda t, _: ["quantize", "digits", "--prompts", t / "no", "--output", t / "x"],
        "prompts .* cannot be read",
    ),
    "guidance": (
        lambda t, _: ["quantize", "digits", "--guidance-scale", "nan", "--output", t / "x"],
        "must be a number from 0 to 100",
    ),
    "no guidance": (
        lambda t, _: ["quantize", "digits", "--guidance-scale", 2, "--output", t / "x"],
        "guidance_scale must not be given: DDIMPipeline takes none",
    ),
    "device": (
        lambda t, _: ["quantize", "digits", "--device", "abacus", "--output", t / "x"],
        "device 'abacus' cannot be used",
    ),
    **{
        f"calibration with another {name}": (
            lambda t, model, words=words: [
                "quantize",
                "digits",
                *QUICK,
                "--refine",
                "none",
                "--output",
                t / "x",
                "--calibration",
                model.parent / "c.safetensors",
                *words,
            ],
            f"is the state of another calibration: .* different calls: {message}",
        )
        for name, words, message in (
            ("seed", ["--seed", 7], "seed 7 and 0"),
            ("number of steps", ["--steps", 3], "steps 3 and 2"),
            ("batch", ["--count", 8, "--batch", 8], "batch 8 and 4"),
            ("number of calls", ["--count", 8], "2 and 1 calls"),
            ("sampler", ["--sampler", "plms"], "sampler PNDMScheduler and DDIMScheduler"),
        )
    },
    "attention in blocks": (
        lambda t, _: [
            "quantize",
            "digits",
            "--scheme",
            "mx",
            "--attention-bits",
            4,
            "--output",
            t / "x",
        ],
        "attention_bits must be None where layers are in block formats",
    ),
    "glob": (
        lambda t, _: ["quantize", "digits", "--exclude", "transformer", "--output", t / "x"],
        "exclude has 'transformer', which matches no layer",
    ),
    "report": (
        lambda t, _: ["quantize", "digits", "--report", t / "r.pdf", "--output", t / "x"],
        r"report .* must be a new \.html file",
    ),
    "calibration": (
        lambda t, _: ["quantize", "digits", "--calibration", written(t, "a"), "--output", t / "x"],
        "cannot be read as a calibration",
    ),
    "block scheme": (
        lambda t, _: [
            "quantize",
            "digits",
            "--scheme",
            "mx",
            "--weight-bits",
            5,
            "--output",
            t / "x",
        ],
        r"weight_bits must be one of \(4, 6, 8\) with scheme 'mx', not 5",
    ),
    "filter": (
        lambda _, model: ["inspect", model, "--filter", "transformer"],
        "filter 'transformer' matches none of the 65 names",
    ),
    "inspect": (lambda t, _: ["inspect", t / "no"], "is not a folder"),
    "json": (
        lambda t, model: ["inspect", model, "--json", written(t, "kept")],
        r"must be a new \.json file",
    ),
    "json and csv": (
        lambda _, model: ["inspect", model, "--json", "-", "--csv", "-"],
        "json and csv must not both be -",
    ),
    "refine": (
        lambda t, _: [
            "quantize",
            "digits",
            "--scheme",
            "mx",
            "--attention-bits",
            4,
            "--output",
            t / "x",
        ],
        "attention_bits must be None where layers are in block formats",
    ),
    "refine twice": (
        lambda t, _: [
            "quantize",
            "digits",
            "--refine",
            "none",
            "--refine-rounding",
            "gptq",
            "--output",
            t / "x",
        ],
        "--refine cannot be combined with --refine-rounding",
    ),
    "features": (
        lambda _, model: ["evaluate", model, "--original", "digits", "--features", "vgg"],
        "features must be pixels, digits",
    ),
    "one image": (
        lambda _, model: ["evaluate", model, "--original", "digits", "--count", 1],
        "count must be at least 2",
    ),
    "state": (
        lambda t, model: ["evaluate", model, "--original", "digits", "--state", t / "state"],
        r"state .* must be a new \.safetensors file",
    ),
    "no state": (
        lambda t, model: ["evaluate", model, "--original", "digits", "--state", written(t, "kept")],
        "cannot be read as a state of msfp evaluate",
    ),
    "against itself": (
        lambda _, model: ["evaluate", model, "--original", model],
        "is quantized already",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_two(case, digits, tmp_path, capsys):
    words, message = BAD[case]
    assert_refused(words(tmp_path, digits / "model"), message, tmp_path, capsys)
