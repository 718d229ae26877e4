import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from scripts import Script, pair


def same_files(one, other):
    expected, found = load_file(one), load_file(other)
    assert expected.keys() == found.keys()
    return all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path):
    """Killed without warning as soon as there is a state, with everything on that has a state."""
    whole = Script(tmp_path / "whole")
    killed = Script(tmp_path / "killed", "--slowly")
    state = tmp_path / "killed" / "state.safetensors"
    deadline = time.monotonic() + 300
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert killed.kill() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final.safetensors").exists()
    Script(tmp_path / "killed", "--resume").finish()
    whole.finish()
    assert same_files(*(tmp_path / each / "final.safetensors" for each in ("whole", "killed")))


def two(tmp_path, name, *arguments):
    """The folders of two processes that trained together."""
    folders = [tmp_path / f"{name}{rank}" for rank in range(2)]
    pair(folders, *arguments)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("position", ["inside", pytest.param("beside", marks=pytest.mark.slow)])
def test_two_processes_follow_one_at_the_same_global_batch(tmp_path, position):
    folders = two(tmp_path, "two", "--plain", f"--{position}")
    Script(tmp_path / "one", "--plain", f"--{position}").finish()
    alone = load_file(tmp_path / "one" / "trained.safetensors")
    first, second = (load_file(folder / "trained.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # After a few steps; Adam makes large what is nearly nothing in a gradient of zero.
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["inside", "beside"])
def test_processes_that_share_out_the_weights_train_as_those_that_hold_them_all(tmp_path, position):
    """To the last bit, with half of the frozen weights each."""
    given = ("--teacher", f"--{position}")
    whole, parts = (
        two(tmp_path, name, *given, *more) for name, more in (("w", ()), ("p", ("--shard",)))
    )
    facts = [load_file(folder / "facts.safetensors") for folder in (*whole, *parts)]
    assert facts[2]["held"].unique().numel() == 1
    assert facts[2]["held"][0] < 0.55 * facts[0]["held"][0]
    for one, other in zip(whole, parts, strict=True):
        assert same_files(one / "final.safetensors", other / "final.safetensors")
    torch.testing.assert_close(facts[2]["errors"], facts[0]["errors"], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_processes_that_share_out_the_weights_resume_from_one_state(tmp_path):
    whole = two(tmp_path, "whole", "--teacher", "--shard")
    two(tmp_path, "stopped", "--teacher", "--shard", "--keep", "--stop")
    resumed = two(tmp_path, "resumed", "--teacher", "--shard", "--keep", "--resume")
    assert not (tmp_path / "stopped0" / "final.safetensors").exists()
    for one, other in zip(whole, resumed, strict=True):
        assert same_files(one / "final.safetensors", other / "final.safetensors")
