import json

import pytest
import torch
from diffusers import DDIMPipeline, DDPMScheduler
from tiny import tiny_pipeline

from msfp import load
from msfp.cli import main
from msfp.denoiser import denoiser_of
from msfp.layers import sealed_layers
from msfp.training.state import TrainingState

SAMPLING = ["--sampler-steps", "3", "--sampler-batch", "4", "--count", "8", "--held-out", "4"]
SHORT = [*SAMPLING, "--steps", "4", "--batch", "6", "--rank", "2", "--evaluate-every", "2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a full-precision pipeline, and that of the quantized one."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "full")
    command = ["quantize", folder / "full", "--output", folder / "quantized", "--steps", "3"]
    assert main([*map(str, command), "--count", "4", "--batch", "4"]) == 0
    return folder / "full", folder / "quantized"


def finetuned(folders, output, *more):
    full, quantized = folders
    command = ["finetune", quantized, "--teacher", full, "--output", output, *SHORT, *more]
    return main([str(word) for word in command])


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """The output of a run that was not interrupted."""
    output = tmp_path_factory.mktemp("whole") / "tuned"
    assert finetuned(folders, output, "--hub", "2", "--power", "1", "--save-every", "1") == 0
    return output


def test_it_writes_a_checkpoint_that_loads_with_its_hub_and_router(whole):
    pipe = load(whole)
    assert all(layer.entries == 2 for layer in sealed_layers(pipe.unet).values())
    assert pipe.unet.router.kind == "learned"
    assert not list(whole.parent.glob("*.state*"))


def test_its_report_has_errors_images_routing_and_the_curve_of_training(whole):
    page = (whole / "report.html").read_text()
    for part in ("Images from equal noise", "Error by timestep", "Training", "Routing"):
        assert f"<h2>{part}</h2>" in page
    assert page.count("data:image/png;base64") == 4
    numbers = json.loads((whole / "finetuning.json").read_text())
    assert [row["name"] for row in numbers["rows"]] == ["quantized", "fine-tuned"]
    assert all(len(row["errors"]) == 3 for row in numbers["rows"])
    assert len(numbers["losses"]) == 4
    assert set(numbers["held_out_errors"]) == {"0", "2", "4"}
    assert len(numbers["routing"]) == len(sealed_layers(load(whole).unet))


def test_an_interrupted_run_is_resumed_to_the_same_codes(
    folders, whole, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "tuned"
    options = ["--hub", "2", "--power", "1", "--save-every", "1"]
    save = TrainingState.save

    def save_and_stop(self, file, **facts):
        save(self, file, **facts)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", save_and_stop)
    assert finetuned(folders, output, *options) == 130
    state = tmp_path / "tuned.state.safetensors"
    assert f"{state} is there, whole" in capsys.readouterr().err
    monkeypatch.undo()
    assert finetuned(folders, output, *options) == 2
    assert "give --resume, or delete the file" in capsys.readouterr().err
    assert finetuned(folders, output, *options, "--resume") == 0
    assert not state.exists()
    expected = load(whole).unet.state_dict()
    resumed = load(output).unet.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_comparing_trains_without_each_ingredient(folders, tmp_path, capsys):
    output = tmp_path / "tuned"
    assert finetuned(folders, output, "--hub", "2", "--power", "1", "--compare") == 0
    rows = json.loads((output / "finetuning.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "quantized",
        "scales, biases and norms alone",
        "single LoRA",
        "hub of 2",
        "fine-tuned",
    ]
    assert "scales, biases and norms alone" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_before_training(folders, tmp_path, capsys):
    full, quantized = folders

    def refused(message, *more, teacher=full):
        assert finetuned((teacher, quantized), tmp_path / "tuned", *more) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("tuned*"))

    pipe = tiny_pipeline()
    DDIMPipeline(pipe.unet, DDPMScheduler()).save_pretrained(tmp_path / "other")
    refused("teacher's sampler must be that of", teacher=tmp_path / "other")
    denoiser_of(pipe).mid_block.resnets[0].conv1.weight.data.mul_(2)
    pipe.save_pretrained(tmp_path / "changed")
    refused("nothing to resume", "--resume")
    refused("hub must be 1 where LoRAs are beside", "--place", "beside", "--hub", "2")
    refused("prompts and labels must not be given", "--labels", "1")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    assert finetuned(folders, tmp_path / "there") == 2
    assert "not empty" in capsys.readouterr().err
