import pytest
import torch

from msfp import InputError
from msfp.evaluation.frechet import FeatureMoments
from msfp.support.autosave import SAVE_SECONDS, TimedState, check_state
from msfp.support.run_files import save_run

KIND = "a state of a test"


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now, saves = [0.0], []

    def slow(*_):
        saves.append(now[0])
        now[0] += 10.0

    monkeypatch.setattr("msfp.support.autosave.save_run", slow)
    monkeypatch.setattr("msfp.support.autosave.time.monotonic", lambda: now[0])
    state, moments = TimedState(tmp_path / "e.safetensors", KIND, {}), FeatureMoments()
    while now[0] < 1000:
        state.save(moments)
        now[0] += 1.0
    assert saves[0] == SAVE_SECONDS
    assert 10.0 * len(saves) < 0.06 * now[0]


def test_only_a_state_of_this_kind_or_a_new_file_is_taken(tmp_path):
    save_run(tmp_path / "other.safetensors", "something else", {"a": torch.zeros(1)}, {})
    (tmp_path / "text.safetensors").write_text("none")
    for name in ("other.safetensors", "text.safetensors"):
        with pytest.raises(InputError, match=f"{name} is not {KIND}"):
            check_state(tmp_path / name, KIND)
    for name in ("new.txt", "no/new.safetensors"):
        with pytest.raises(InputError, match=r"state .* must be a new \.safetensors file"):
            check_state(tmp_path / name, KIND)
    check_state(tmp_path / "new.safetensors", KIND)
