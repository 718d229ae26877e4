import html
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from refusals import assert_refused
from scripts import pair
from tiny import tiny_pipeline

from msfp import load
from msfp.cli import finetuning_run
from msfp.cli.finetuning_record import FILE, KIND
from msfp.cli.main import main
from msfp.experiments.reference.digits import digits
from msfp.layers.packed import packed_layers
from msfp.support.container import read, write
from msfp.training import finetuning, processes
from msfp.training.state import TrainingState

SAMPLING = ["--sampler-steps", "3", "--sampler-batch", "4", "--count", "8", "--held-out", "4"]
SHORT = [*SAMPLING, "--steps", "4", "--batch", "6", "--rank", "2", "--evaluate-every", "2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a full-precision pipeline, and that of the quantized one, to nearest."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "full")
    command = ["quantize", folder / "full", "--output", folder / "quantized", "--steps", "3"]
    assert main([*map(str, command), "--refine", "none", "--count", "4", "--batch", "4"]) == 0
    return folder / "full", folder / "quantized"


def words(folders, output, *more):
    full, quantized = folders
    command = ["finetune", quantized, "--original", full, "--output", output, *SHORT, *more]
    return [str(word) for word in command]


def finetuned(folders, output, *more):
    return main(words(folders, output, *more))


def numbers(output):
    return json.loads((output / "finetuning.json").read_text())


def assert_same_codes(one, other):
    expected, found = (load(output).unet.state_dict() for output in (one, other))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture
def stopped_at(monkeypatch):
    """A function that has the next runs interrupted once a state of some number is saved."""
    save, saved = TrainingState.save, []

    def stop_at(number):
        def save_and_stop(self, file, **facts):
            save(self, file, **facts)
            saved.append(file)
            if len(saved) == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(TrainingState, "save", save_and_stop)

    yield stop_at
    monkeypatch.undo()


@pytest.fixture
def nothing_recorded(monkeypatch):
    def recorded(*_):
        raise AssertionError

    monkeypatch.setattr(finetuning_run, "record_trajectories", recorded)


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """The output of a run that was not interrupted."""
    output = tmp_path_factory.mktemp("whole") / "tuned"
    assert finetuned(folders, output, "--hub", "2", "--dfa-power", "1", "--save-every", "1") == 0
    return output


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """The output of a run of one process with a single LoRA."""
    output = tmp_path_factory.mktemp("alone") / "tuned"
    assert finetuned(folders, output) == 0
    return output


def test_it_writes_a_checkpoint_that_loads_with_its_hub_and_router(whole):
    pipe = load(whole)
    assert all(layer.adapters == 2 for layer in packed_layers(pipe.unet).values())
    assert pipe.unet.router.kind == "learned"
    assert not list(whole.parent.glob("*.state*"))


def test_its_report_has_errors_images_routing_and_the_curve_of_training(whole):
    page = (whole / "report.html").read_text()
    for part in ("Images from equal noise", "Error by timestep", "Training", "Routing"):
        assert f"<h2>{part}</h2>" in page
    assert page.count("data:image/png;base64") == 4
    found = numbers(whole)
    assert [row["name"] for row in found["rows"]] == ["quantized", "fine-tuned"]
    assert all(len(row["errors"]) == 3 for row in found["rows"])
    assert len(found["losses"]) == 4
    assert set(found["held_out_errors"]) == {"0", "2", "4"}
    assert found["rows"][-1]["best"] > 0
    assert len(found["routing"]) == len(packed_layers(load(whole).unet))


def test_its_report_says_how_it_was_run(folders, whole):
    full, quantized = folders
    run = {
        "checkpoint": str(quantized),
        "original": str(full),
        "sampler": "DDIMScheduler",
        "sampler_steps": 3,
        "sampler_batch": 4,
        "guidance_scale": None,
        "count": 8,
        "held_out": 4,
        "seed": 100,
        "dtype": "float32",
    }
    assert numbers(whole)["run"] == run
    page = (whole / "report.html").read_text()
    for key, value in run.items():
        assert f"<td>{key}</td><td>{value}</td>" in page


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_to_the_same_codes(
    folders, whole, tmp_path, stopped_at, capsys
):
    output, state = tmp_path / "tuned", tmp_path / "tuned.state"
    options = ["--hub", "2", "--dfa-power", "1", "--save-every", "1"]
    stopped_at(2)
    assert finetuned(folders, output, *options) == 130
    assert f"{state} is saved" in capsys.readouterr().err
    (fingerprint, facts), images = read(state / FILE, KIND)
    assert facts["seconds"]["fine-tuned"] > 0
    facts["seconds"]["fine-tuned"] += 600
    write(state / FILE, KIND, images, facts, fingerprint)
    assert finetuned(folders, output, *options) == 2
    assert "give --resume, or delete the folder" in capsys.readouterr().err
    assert finetuned(folders, output, *options, "--resume") == 0
    assert not state.exists()
    assert_same_codes(whole, output)
    assert 10 < numbers(output)["rows"][-1]["minutes"] < 20


@pytest.mark.slow
def test_a_killed_command_is_resumed_to_the_same_codes(folders, tmp_path):
    options = ["--steps", "30", "--save-every", "4", "--evaluate-every", "15"]
    assert finetuned(folders, tmp_path / "whole", *options) == 0
    command = [
        sys.executable,
        "-m",
        "msfp.cli.main",
        *words(folders, tmp_path / "killed", *options),
    ]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | threads)  # noqa: S603
    state = tmp_path / "killed.state" / "fine-tuned.safetensors"
    until = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert state.exists()
    assert finetuned(folders, tmp_path / "killed", *options, "--resume") == 0
    assert_same_codes(tmp_path / "whole", tmp_path / "killed")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}


PARTS = ["quantized", "scales, biases and norms alone", "single LoRA", "hub of 2", "fine-tuned"]
COMPARE = ["--hub", "2", "--dfa-power", "1", "--compare", "--save-every", "2"]


@pytest.fixture(scope="module")
def compared(folders, tmp_path_factory):
    """The output of a comparison that was not interrupted, and the configs it trained by."""
    output, configs = tmp_path_factory.mktemp("compared") / "tuned", []

    def spy(model, config, **options):
        configs.append(config)
        return finetuning.finetune(model, config, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning_run, "finetune", spy)
        assert finetuned(folders, output, *COMPARE) == 0
    return output, configs


@pytest.mark.slow
def test_comparing_trains_without_each_ingredient(compared):
    output, configs = compared
    rows = numbers(output)["rows"]
    assert [row["name"] for row in rows] == PARTS
    told = [(config.rates.adapters > 0, config.hub, config.dfa_power) for config in configs]
    assert told == [(False, 1, 0), (True, 1, 0), (True, 2, 0), (True, 2, 1)]
    errors = [sum(row["errors"]) for row in rows]
    assert len(set(errors)) == len(errors)
    assert min(errors[1:]) < errors[0]
    assert [row["minutes"] > 0 for row in rows] == [False, True, True, True, True]


@pytest.mark.slow
def test_an_interrupted_comparison_resumes_inside_the_training_where_it_was(
    folders, compared, tmp_path, stopped_at, monkeypatch
):
    output, steps = tmp_path / "tuned", []
    stopped_at(3)  # each training saves two
    assert finetuned(folders, output, *COMPARE) == 130
    state = tmp_path / "tuned.state"
    assert {file.name for file in state.iterdir()} == {
        FILE,
        "single-LoRA.safetensors",
    }
    assert list(read(state / FILE, KIND)[0].facts["rows"]) == ["scales, biases and norms alone"]
    monkeypatch.undo()
    finetuned_by = finetuning_run.FinetuningRun.finetuned

    def counted(self, config, **options):
        pipe, history, seconds = finetuned_by(self, config, **options)
        steps.append((options["resume"], len(history.losses)))
        return pipe, history, seconds

    monkeypatch.setattr(finetuning_run.FinetuningRun, "finetuned", counted)
    assert finetuned(folders, output, *COMPARE, "--resume") == 0
    assert steps == [(True, 4), (False, 4), (False, 4)]
    assert not state.exists()
    assert_same_codes(compared[0], output)
    for row, other in zip(numbers(output)["rows"], numbers(compared[0])["rows"], strict=True):
        assert {**row, "minutes": 0} == {**other, "minutes": 0}
    assert (output / "report.html").read_text().count("data:image/png;base64") == 4


def test_what_interrupts_before_the_first_state_leaves_nothing(folders, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning_run, "finetune", interrupted)
    assert finetuned(folders, tmp_path / "tuned") == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_that_brings_nothing_is_reported_as_that(folders, tmp_path, capsys):
    groups = ("adapters", "weight-scales", "input-scales")
    rates = [word for group in groups for word in (f"--rates-{group}", "1")]
    assert finetuned(folders, tmp_path / "tuned", *rates) == 0
    note = (
        "'fine-tuned': training did not lower the held-out error, so the initial weights are kept."
    )
    assert note in capsys.readouterr().out
    assert html.escape(note) in (tmp_path / "tuned" / "report.html").read_text()
    found = numbers(tmp_path / "tuned")
    assert found["rows"][-1]["best"] == 0
    assert found["config"]["rates"]["weight_scales"] == 1.0
    assert found["config"]["rates"]["norms"] == 2e-4
    assert found["config"]["cache_teacher"] is True


def test_it_trains_on_images_where_it_is_given_a_folder_of_them(
    folders, alone, tmp_path, stopped_at, capsys, monkeypatch
):
    for number, image in enumerate(digits()[0][:8, 0]):
        pixels = (255 * (image + 1) / 2).round().byte().numpy()
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
    output, options = tmp_path / "tuned", ["--data", tmp_path / "data", "--save-every", "2"]
    stopped_at(1)
    assert finetuned(folders, output, *options) == 130
    assert finetuned(folders, output, "--save-every", "2", "--resume") == 2
    assert "its --data is " in capsys.readouterr().err
    monkeypatch.undo()
    assert finetuned(folders, output, *options, "--resume") == 0
    found = numbers(output)
    assert found["run"]["data"] == str(tmp_path / "data")
    assert found["rows"][0]["errors"] == numbers(alone)["rows"][0]["errors"]  # held out as ever
    assert found["losses"] != numbers(alone)["losses"]
    assert found["rows"][1]["best"] > 0


@pytest.mark.slow
def test_a_teacher_that_predicts_at_each_step_gives_the_same(folders, alone, tmp_path):
    assert finetuned(folders, tmp_path / "computed", "--no-cache-teacher") == 0
    computed = numbers(tmp_path / "computed")
    told = [found["config"]["cache_teacher"] for found in (numbers(alone), computed)]
    assert told == [True, False]
    assert computed["losses"] == pytest.approx(numbers(alone)["losses"], rel=1e-2)


@pytest.mark.usefixtures("nothing_recorded")
def test_what_does_not_fit_is_refused_before_anything_is_recorded(
    folders, whole, tmp_path, monkeypatch, capsys
):
    full, quantized = folders

    def refused(message, *more, original=full, checkpoint=quantized):
        assert finetuned((original, checkpoint), tmp_path / "tuned", *more) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("tuned*"))

    pipe = tiny_pipeline()
    DDIMPipeline(pipe.unet, DDPMScheduler()).save_pretrained(tmp_path / "other")
    settings = "the same sampler settings, not clip_sample=True and clip_sample=False"
    refused(settings, original=tmp_path / "other")
    refused("nothing to resume", "--resume")
    refused("prompts and labels must not be given", "--labels", "1")
    refused("fine-tuned with a hub cannot be", checkpoint=whole)
    refused("rate of norms must be between 0 and 1, not 2.0", "--rates-norms", "2")
    groups = ("adapters", "weight-scales", "input-scales", "biases", "norms")
    frozen = [word for group in groups for word in (f"--rates-{group}", "0")]
    refused("at least one rate must be above 0", *frozen)
    refused("absent is not a folder", "--data", tmp_path / "absent")
    (tmp_path / "file").write_text("")
    refused("must be a folder to write in: Not a directory", "--tensorboard", tmp_path / "file")
    monkeypatch.setattr(processes, "is_tensorboard_available", lambda: False)
    refused("tensorboard must be installed", "--compare", "--tensorboard", tmp_path / "logs")
    monkeypatch.setattr(UNet2DModel, "_supports_gradient_checkpointing", False)
    refused("checkpointing must be False", "--checkpointing")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rates-lora", "1"], "unrecognized arguments: --rates-lora 1"),
        (["--rates-norms", "fast"], "argument --rates-norms: invalid float value: 'fast'"),
        (["--rates-norms"], "argument --rates-norms: expected one argument"),
    ],
)
def test_rates_that_cannot_be_read_are_refused(folders, more, message, tmp_path, capsys):
    assert_refused(words(folders, tmp_path / "tuned", *more), message, tmp_path, capsys)


@pytest.mark.usefixtures("nothing_recorded")
def test_an_output_that_cannot_be_made_is_refused_before_anything_is_recorded(
    folders, tmp_path, capsys
):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    for output, message in (
        (tmp_path / "there", "not empty"),
        ("/proc/foo/bar", "output /proc/foo/bar cannot be made"),
        (tmp_path / ("x" * 250), "File name too long"),
    ):
        assert finetuned(folders, output) == 2
        assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_a_state_of_other_settings_is_refused_before_anything_is_recorded(
    folders, whole, tmp_path, stopped_at, capsys, request
):
    output, options = tmp_path / "tuned", ["--save-every", "2"]
    stopped_at(1)
    assert finetuned(folders, output, *options) == 130
    request.getfixturevalue("nothing_recorded")
    kept = {file: file.read_bytes() for file in (tmp_path / "tuned.state").iterdir()}
    for more, message in (
        (["--dfa-power", "1"], "its --dfa-power is 0.0, not 1.0"),
        (["--seed", "7"], "its --seed is 100, not 7"),
        (["--count", "12"], "its --count is 8, not 12"),
        (["--compare"], "its --compare is False, not True"),
        (["--rates-norms", "0"], "its --rates-norms is 0.0002, not 0.0"),
    ):
        assert finetuned(folders, output, *options, *more, "--resume") == 2
        assert (
            f"{FILE} is a record of fine-tuning of another run: {message}"
            in capsys.readouterr().err
        )
    assert finetuned((folders[0], whole), output, *options, "--resume") == 2
    assert "a record of fine-tuning of another run: its checkpoint is" in capsys.readouterr().err
    file = tmp_path / "tuned.state" / FILE
    file.write_text("{")
    assert finetuned(folders, output, *options, "--resume") == 2
    assert f"{FILE} cannot be read as a record of fine-tuning" in capsys.readouterr().err
    file.write_bytes(kept[file])
    assert kept == {file: file.read_bytes() for file in (tmp_path / "tuned.state").iterdir()}


@pytest.mark.slow
def test_two_processes_write_what_one_does(folders, alone, tmp_path):
    logs = [tmp_path / f"rank {rank}" for rank in range(2)]
    command = words(folders, tmp_path / "shared")
    first, second = pair(logs, *command, module="msfp.cli.main")
    printed = [each.printed.read_text() for each in (first, second)]
    assert ["Fine-tuned: " in text for text in printed] == [True, False]
    # Gradients are added up in another order.
    losses = numbers(tmp_path / "shared")["losses"]
    assert losses == pytest.approx(numbers(alone)["losses"], rel=1e-3)
    files = {each.printed.name for each in (first, second)}
    assert {path.name for path in tmp_path.iterdir()} == {"shared"} | files


@pytest.mark.slow
def test_processes_of_accelerate_write_what_one_does(folders, alone, tmp_path):
    # With --cpu it launches one process; these are told by the environment that they have no GPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "msfp.cli.main"]
    command = [*launch, *words(folders, tmp_path / "shared")]
    variables = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training: fine-tuned") == 2
    assert done.stdout.count("Fine-tuned: ") == 1
    # Gradients are added up in another order.
    losses = numbers(tmp_path / "shared")["losses"]
    assert losses == pytest.approx(numbers(alone)["losses"], rel=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
