import subprocess
import sys
import time

import pytest
import torch

from msfp import InputError
from msfp.support.run_files import described, digest, part, same, save_run, saved_tensors

KIND = "a state of something"


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    file = tmp_path / "s.safetensors"
    tensors = {"a/x": torch.randn(3, 4).T, "b/y": torch.tensor(7)}
    save_run(file, KIND, tensors, {"run": {"seed": 1}, "losses": [0.1]})
    assert described(file, KIND, {"seed": 1}) == {"run": {"seed": 1}, "losses": [0.1]}
    back = saved_tensors(file)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], each) for name, each in tensors.items())
    assert torch.equal(part("a", back)["x"], tensors["a/x"])
    assert digest(sorted(back.items())) == digest(sorted(tensors.items()))


@pytest.mark.parametrize("failing", ["save_file", "os.fsync", "Path.replace"])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    file = tmp_path / "s.safetensors"
    save_run(file, KIND, {"x": torch.zeros(2)}, {"run": {}})
    before = file.read_bytes()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"msfp.support.run_files.{failing}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_run(file, KIND, {"x": torch.ones(2)}, {"run": {}})
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_what_a_killed_process_leaves_goes_with_the_next_save(tmp_path):
    file = tmp_path / "s.safetensors"
    code = (
        "import sys, torch; from pathlib import Path; from msfp.support.run_files import save_run\n"
        "tensors = {'x': torch.zeros(1 << 25)}\n"
        "print('ready', flush=True)\n"
        "while True: save_run(Path(sys.argv[1]), 'kind', tensors, {'run': {}})"
    )
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: S603
        process.stdout.readline()
        started = time.monotonic()
        while not list(tmp_path.glob(".*/*")) and time.monotonic() < started + 60:
            pass
        process.kill()
    assert list(tmp_path.glob(".*/*"))
    save_run(file, KIND, {"x": torch.zeros(2)}, {"run": {}})
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    assert described(file, KIND, {}) == {"run": {}}


REFUSED = {
    "differs": ({"seed": 1}, {"seed": 2}, "its seed is 1, not 2"),
    "older": ({}, {"seed": 2}, "it does not say its seed, as one of an earlier version"),
    "newer": ({"hub": 2}, {}, "its hub is 2, which this one does not have"),
    "long": ({"path": [1.0] * 9}, {"path": [2.0] * 9}, "its path are others"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_of_another_run_is_refused_by_what_differs(case, tmp_path):
    saved, run, message = REFUSED[case]
    file = tmp_path / "s.safetensors"
    save_run(file, KIND, {"x": torch.zeros(1)}, {"run": saved})
    with pytest.raises(InputError, match=f"is the state of another run: {message}"):
        described(file, KIND, run)


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "s.safetensors"
    save_run(file, "a state of something else", {"x": torch.zeros(1)}, {"run": {}})
    for each in (file, tmp_path / "none"):
        with pytest.raises(InputError, match=f"is not {KIND}"):
            described(each, KIND, {})


def test_numbers_may_differ_by_rounding_and_lists_of_words_may_not():
    assert same([1.0, 2.0], [1.0, 2.01])
    assert not same([1.0, 2.0], [1.0, 2.2])
    assert not same(["a"], ["b"])
    assert not same([1.0], [1.0, 1.0])
