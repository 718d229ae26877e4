import argparse

import pytest
import torch
from tiny import tiny_pipeline

from msfp import InputError
from msfp.cli.loading import check_model, load_pipeline
from msfp.cli.main import main
from msfp.support.paging import PageFolder


def test_folders_of_pipelines_and_names_on_the_hub_are_models(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    check_model(str(tmp_path / "pipe"))
    check_model("owner/name-1.0")


def test_a_folder_that_is_no_pipeline_is_told_from_one_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"is not a pipeline folder: it has no model_index\.json"):
        check_model(str(tmp_path))
    for name in (str(tmp_path / "absent"), "absent", "./a/b", "a/b/c"):
        with pytest.raises(InputError, match="is no folder: it must be a pipeline folder, a name"):
            check_model(name)


def test_a_name_on_the_hub_that_is_not_in_the_cache_is_refused_in_a_sentence(tmp_path, capsys):
    words = ["quantize", "no-such-owner/no-such-model", "--local-files-only"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no-such-owner/no-such-model cannot be loaded: " in line
    assert not list(tmp_path.iterdir())


def folder_of_halves(folder):
    tiny_pipeline().to(torch.float16).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("unet/*.safetensors"))) > 1
    return folder


def test_an_offloaded_pipeline_has_in_files_what_loading_casts(tmp_path, monkeypatch):
    monkeypatch.setattr("msfp.support.paging.SMALL", 1)
    written, write = [], PageFolder._written

    def spy(pages, memory):
        written.append(memory.nbytes())
        return write(pages, memory)

    monkeypatch.setattr(PageFolder, "_written", spy)
    model, words = folder_of_halves(tmp_path / "pipe"), {"device": "cpu", "sampler": None}
    arguments = argparse.Namespace(dtype="float32", local_files_only=True, **words)
    plain = load_pipeline(str(model), arguments).unet.state_dict()
    assert not written
    away = load_pipeline(str(model), arguments, PageFolder(tmp_path)).unet.state_dict()
    assert sum(written) >= sum(value.nbytes for value in away.values())
    assert all(torch.equal(value, away[name]) for name, value in plain.items())
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]


def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    model = folder_of_halves(tmp_path / "pipe")
    monkeypatch.setattr("msfp.support.memory.available_bytes", lambda: 100_000)
    arguments = argparse.Namespace(
        dtype="float32", local_files_only=True, device="cpu", sampler=None, offload=False
    )
    with pytest.raises(InputError, match=r"GB of memory are free: give --offload"):
        load_pipeline(str(model), arguments)
    load_pipeline(str(model), arguments, PageFolder(tmp_path))
    monkeypatch.setattr("msfp.support.memory.free_disk", lambda _: 100_000)
    with pytest.raises(InputError, match=r"GB of the disk of .* are free$"):
        load_pipeline(str(model), arguments, PageFolder(tmp_path))
