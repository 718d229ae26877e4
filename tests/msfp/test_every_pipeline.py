"""Small pipelines of every kind, taken all the way in Python and on the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import CASES
from safetensors.torch import save_file

import msfp
from msfp.cli.main import main
from msfp.pipelines.denoiser import denoisers_of
from msfp.support.decibels import sqnr

WITHOUT_IMAGES = {"AllegroPipeline", "KandinskyV22PriorPipeline", "StableCascadePriorPipeline"}
"""Pipelines that return embeddings, or latents here."""
OWN_PROCESSORS = {"StableDiffusionPAGPipeline"}
"""Pipelines that set attention processors during a call; nothing is trained on recordings then."""
ADDED = {"StableDiffusionPipeline, IP-Adapter"}
"""Pipelines with weights that diffusers added to the denoiser."""
RUN = [name for name, case in CASES.items() if not case.reason and name not in ADDED]
BY_DEFAULT = {
    "FluxImg2ImgPipeline", "PixArtSigmaPipeline", "StableAudioPipeline",
    "WanPipeline, two experts",
}  # fmt: skip
COMMANDS_BY_DEFAULT = {"FluxImg2ImgPipeline"}


def some(names):
    """The names, most of them marked slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in names)) for name in RUN]


def split(case):
    """The conditions, the number of steps and the further arguments of a case's call."""
    others = dict(case.arguments())
    steps = others.pop("num_inference_steps", 2)
    conditions = ()
    if isinstance(others.get("prompt"), str):
        conditions = (others.pop("prompt"),)
    elif "class_labels" in others:
        labels = others.pop("class_labels")
        conditions = tuple(labels) if isinstance(labels, list) else (labels,)
    return conditions, steps, others


@pytest.mark.parametrize("name", some(BY_DEFAULT))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pipeline_is_taken_all_the_way(name, tmp_path):
    case = CASES[name]
    full, pipe = case.make(), case.make()
    assert tuple(denoisers_of(pipe)) == case.denoisers
    before = case.call(pipe)
    conditions, steps, others = split(case)
    calls = (
        msfp.prompt_calls(conditions, steps=steps, **others)
        if conditions or others
        else msfp.Sampler(steps, batch=2).calls(2, seed=0)
    )
    layers = msfp.quantize(pipe, calibration=calls)
    several = len(case.denoisers) > 1
    for each in case.denoisers:
        config = getattr(pipe, each).hf_quantizer.quantization_config.request
        assert config.refine is not None
        assert not several or any(layer.name.startswith(f"{each}.") for layer in layers)
    msfp.pack(pipe)
    after = case.call(pipe)
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    msfp.save(pipe, tmp_path / "quantized")
    if case.saved:
        pipe = msfp.load(tmp_path / "quantized")
        energy, error = after.double().square().sum(), (case.call(pipe) - after).double()
        assert sqnr(energy.item(), error.square().sum().item()) > 100
    facts = msfp.inspect_layers(tmp_path / "quantized")
    assert {each.layer for each in facts} == {layer.name for layer in layers}
    sampler = msfp.Sampler(steps, batch=1, conditions=conditions, extra=others)
    if name in WITHOUT_IMAGES:
        with pytest.raises(msfp.InputError, match="the pipeline must make images"):
            msfp.compare(pipe, original=full, sampler=sampler, count=2, seed=3)
    else:
        found = msfp.compare(pipe, original=full, sampler=sampler, count=2, seed=3)
        assert found.values["psnr"] > 5
        assert set(found.layers) <= {each.layer for each in facts}
    for each in case.denoisers:
        tune(*(msfp.select_denoisers(one, each) for one in (pipe, full)), calls, name)


def tune(quantized, original, calls, name):
    """Two steps of fine-tuning, or the sentence that refuses them."""
    msfp.unpack(quantized, original=original)
    paths = msfp.record_trajectories(original, calls=calls)
    config = msfp.FinetuneConfig(rank=2, steps=2, batch=2)
    if name in OWN_PROCESSORS:
        with pytest.raises(msfp.InputError, match="must have been recorded from the teacher"):
            msfp.finetune(quantized, config, trajectories=paths, original=original)
        return
    history = msfp.finetune(quantized, config, trajectories=paths, original=original)
    assert len(history.losses) == 2


def as_json(value, folder):
    """An argument of a call as the command line takes it, with its images and tensors in files."""
    file = folder / f"{len(list(folder.iterdir()))}"
    if isinstance(value, Image.Image):
        value.save(file := file.with_suffix(".png"))
        return str(file)
    if isinstance(value, torch.Tensor):
        save_file({"value": value.contiguous()}, file := file.with_suffix(".safetensors"))
        return str(file)
    if isinstance(value, np.ndarray):
        np.save(file := file.with_suffix(".npy"), value)
        return str(file)
    if isinstance(value, list | tuple):
        return [as_json(each, folder) for each in value]
    return value


@pytest.mark.parametrize("name", some(COMMANDS_BY_DEFAULT))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pipeline_folder_is_taken_all_the_way_by_commands(name, tmp_path, capsys):
    case = CASES[name]
    if not case.saved:
        pytest.skip("diffusers does not load what it saved")
    full = case.make()
    full.save_pretrained(tmp_path / "full")
    conditions, steps, others = split(case)
    (tmp_path / "files").mkdir()
    told = ["--count", "2", "--dtype", "float32"]
    if others:
        told += [
            "--call",
            json.dumps({k: as_json(v, tmp_path / "files") for k, v in others.items()}),
        ]
    if conditions and isinstance(conditions[0], str):
        (tmp_path / "prompts.txt").write_text("\n".join(conditions))
        told += ["--prompts", tmp_path / "prompts.txt"]
    elif conditions:
        told += ["--labels", *conditions]

    def run(*words):
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    folders = [tmp_path / each for each in ("full", "quantized", "tuned")]
    sampling = [*told, "--steps", steps]
    text = run("quantize", folders[0], "--output", folders[1], *sampling)
    assert "4 bits: " in text
    run("inspect", folders[1])
    if name in WITHOUT_IMAGES:
        return
    run("evaluate", folders[1], "--original", folders[0], *sampling)
    run("sample", folders[1], "--output", tmp_path / "images.png", *sampling)
    if name in OWN_PROCESSORS:
        return
    tuning = [*told, "--sampler-steps", steps, "--steps", "2", "--rank", "2", "--batch", "2"]
    tuning += ["--held-out", "2"]
    if len(case.denoisers) > 1:
        tuning += ["--component", case.denoisers[-1]]
    run("finetune", folders[1], "--original", folders[0], "--output", folders[2], *tuning)
    assert (folders[2] / "model_index.json").is_file()


def test_a_pipeline_with_weights_that_were_added_is_refused():
    for name in ADDED:
        pipe = CASES[name].make()
        with pytest.raises(msfp.InputError, match="unload LoRAs and IP-Adapters"):
            msfp.quantize(pipe, calibration=CASES[name].call)
