import json

import pytest
import torch
from safetensors.torch import save_file

from msfp import InputError
from msfp.evaluation.frechet import FeatureMoments
from msfp.support.autosave import SAVE_SECONDS, Autosave, check_state, run_as_fingerprint
from msfp.support.container import FileKind, write

KIND = FileKind("a state of a test")


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now, saves = [0.0], []

    def slow(*_):
        saves.append(now[0])
        now[0] += 10.0

    monkeypatch.setattr("msfp.support.autosave.write", slow)
    monkeypatch.setattr("msfp.support.autosave.time.monotonic", lambda: now[0])
    state, moments = Autosave(tmp_path / "e.safetensors", KIND, {}), FeatureMoments()
    while now[0] < 1000:
        state.save(moments)
        now[0] += 1.0
    assert saves[0] == SAVE_SECONDS
    assert 10.0 * len(saves) < 0.06 * now[0]


def test_only_a_state_of_this_kind_or_a_new_file_is_taken(tmp_path):
    other = FileKind("something else")
    write(tmp_path / "other.safetensors", other, {"a": torch.zeros(1)}, {})
    (tmp_path / "text.safetensors").write_text("none")
    for name, message in {
        "other.safetensors": f"must be {KIND.name}, not {other.name}",
        "text.safetensors": f"cannot be read as {KIND.name}",
    }.items():
        with pytest.raises(InputError, match=f"{name} {message}"):
            check_state(tmp_path / name, KIND)
    for name in ("new.txt", "no/new.safetensors"):
        with pytest.raises(InputError, match=r"state .* must be a new \.safetensors file"):
            check_state(tmp_path / name, KIND)
    check_state(tmp_path / "new.safetensors", KIND)


def test_a_run_resumes_from_a_state_of_version_1_that_is_its_own(tmp_path):
    kind = FileKind("a state", first_key="a state", migrations={1: run_as_fingerprint})
    file, moments, again = tmp_path / "old.safetensors", FeatureMoments(), FeatureMoments()
    moments.update(torch.randn(8, 3))
    facts = json.dumps({"run": {"seed": 1}})
    save_file(moments.tensors(), file, metadata={"a state": facts})
    Autosave(file, kind, {"seed": 1}).restore(again)
    restored = again.tensors()
    assert all(torch.equal(restored[name], each) for name, each in moments.tensors().items())
    with pytest.raises(InputError, match="is a state of another run: its seed is 1, not 2"):
        Autosave(file, kind, {"seed": 2}).restore(again)
