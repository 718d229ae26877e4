import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msfp import Calibration, InputError
from msfp.support.container import FileKind, write
from msfp.support.files import (
    atomic_file,
    atomic_folder,
    check_folder,
    check_new_file,
    check_output,
)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("written")
        raise error
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_made_are_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for path in ("file", "file/x", "file/x/y", "link", "empty"):
        with pytest.raises(InputError, match="output"):
            check_output(tmp_path / path)
    check_output(tmp_path / "new" / "folder")


def test_a_file_is_there_once_it_is_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with atomic_file(tmp_path / "a.json") as partial:
        partial.write_text("whole")
        assert not (tmp_path / "a.json").exists()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "whole")]


def test_a_file_must_be_new_and_of_its_kind_and_its_folder_there(tmp_path):
    (tmp_path / "old.json").write_text("kept")
    check_new_file("json", tmp_path / "new.json", ".json")
    for path in ("old.json", "new.txt", "no/new.json"):
        with pytest.raises(InputError, match=r"json .* must be a new \.json file"):
            check_new_file("json", tmp_path / path, ".json")


def test_what_a_file_system_does_not_make_is_refused_at_once(tmp_path):
    long = tmp_path / ("x" * 250)  # fits by itself, not with what stands before and after it
    for path in ("/proc/foo/bar", long, tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "y"):
        with pytest.raises(InputError, match=r"output .* cannot be made"):
            check_output(Path(path))
    assert not list(tmp_path.iterdir())


def test_a_folder_to_write_in_may_be_there_or_not(tmp_path):
    (tmp_path / "file").write_text("")
    check_folder("logs", tmp_path)
    check_folder("logs", tmp_path / "new" / "folder")
    for path in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/foo")):
        with pytest.raises(InputError, match=r"logs .* must be a folder to write in"):
            check_folder("logs", path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_who_may_read_new_files_may_read_what_is_written(tmp_path, mask):
    tensors = {"a": torch.ones(1)}
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "unet").mkdir()
        save_file(tensors, folder / "unet" / "weights.safetensors")
    with atomic_file(tmp_path / "b.safetensors") as partial:
        save_file(tensors, partial)
    write(tmp_path / "c.safetensors", FileKind("a test"), tensors, {})
    Calibration({}).save(tmp_path / "d.safetensors")
    for path in tmp_path.rglob("*"):
        usual = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == usual & ~mask, path
