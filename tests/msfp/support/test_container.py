import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from msfp import InputError
from msfp.support.autosave import run_as_fingerprint
from msfp.support.container import (
    KEY,
    FileKind,
    Header,
    check_fingerprint,
    header_of,
    metadata,
    part,
    read,
    sort_metadata,
    write,
)
from msfp.support.fingerprints import digest

KIND = FileKind("a state of something", migrations={1: lambda header: header})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "s.safetensors"


def described(file, **description):
    """Write a file of one tensor whose metadata are a description as it is given."""
    save_file({"x": torch.zeros(1)}, file, metadata={KEY: json.dumps(description)})


def test_what_is_written_comes_back_to_the_bit(file):
    tensors = {"a/x": torch.randn(3, 4).T, "b/y": torch.tensor(7)}
    header = Header({"seed": 1}, {"losses": [0.1]})
    write(file, KIND, tensors, header.facts, header.fingerprint)
    assert header_of(file, KIND) == check_fingerprint(file, KIND, {"seed": 1}) == header
    again, back = read(file, KIND)
    assert again == header
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], each) for name, each in tensors.items())
    assert torch.equal(part("a", back)["x"], tensors["a/x"])
    assert digest(sorted(back.items())) == digest(sorted(tensors.items()))


def test_a_file_without_a_fingerprint_has_an_empty_one(file):
    write(file, KIND, {}, {"layers": []})
    assert header_of(file, KIND) == Header({}, {"layers": []})


def test_metadata_are_one_entry_of_json():
    told = metadata(FileKind("a thing", version=7), Header({"seed": 1}, {"losses": []}))
    assert list(told) == [KEY] == ["msfp"]
    assert json.loads(told[KEY]) == {
        "kind": "a thing",
        "version": 7,
        "fingerprint": {"seed": 1},
        "facts": {"losses": []},
    }


@pytest.mark.parametrize("failing", ["save_file", "os.fsync", "Path.replace"])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(failing, file, monkeypatch):
    write(file, KIND, {"x": torch.zeros(2)}, {})
    before = file.read_bytes()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"msfp.support.container.{failing}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(file, KIND, {"x": torch.ones(2)}, {})
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_what_a_killed_process_leaves_goes_with_the_next_save(file):
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from msfp.support.container import FileKind, write\n"
        "tensors = {'x': torch.zeros(1 << 25)}\n"
        "print('ready', flush=True)\n"
        "while True: write(Path(sys.argv[1]), FileKind('a kind'), tensors, {})"
    )
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:  # noqa: S603
        process.stdout.readline()
        started = time.monotonic()
        while not list(file.parent.glob(".*/*")) and time.monotonic() < started + 60:
            pass
        process.kill()
    assert list(file.parent.glob(".*/*"))
    write(file, KIND, {"x": torch.zeros(2)}, {})
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    assert header_of(file, KIND) == Header({}, {})


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"s\.safetensors cannot be written"):
        write(tmp_path / "none" / "s.safetensors", KIND, {}, {})


def test_a_header_of_version_1_is_migrated_from_one_version_to_the_next(file):
    migrations = {
        1: lambda header: Header({"seed": header.facts["seed"]}, header.facts | {"is": 2}),
        2: lambda header: Header(header.fingerprint, header.facts | {"was": header.facts["is"]}),
    }
    kind = FileKind(
        "a thing", 3, "msfp_thing", migrations, {2: lambda named: {"new": named["old"]}}
    )
    facts = json.dumps({"seed": 5})
    save_file({"old": torch.ones(2)}, file, metadata={"msfp_thing": facts})
    migrated = Header({"seed": 5}, {"seed": 5, "is": 2, "was": 2})
    assert header_of(file, kind) == check_fingerprint(file, kind, {"seed": 5}) == migrated
    header, tensors = read(file, kind)
    assert header == migrated
    assert list(tensors) == ["new"]
    assert torch.equal(tensors["new"], torch.ones(2))


def test_nothing_is_migrated_in_a_file_of_the_version_that_is_written(file):
    def never(_):
        raise AssertionError("migrated")

    kind = FileKind("a thing", 2, "msfp_thing", {1: never}, {1: never})
    write(file, kind, {"x": torch.ones(2)}, {"seed": 5})
    header, tensors = read(file, kind)
    assert header == Header({}, {"seed": 5})
    assert list(tensors) == ["x"]


@pytest.mark.parametrize("version", [0, 3, "2", None])
def test_a_file_of_a_version_that_is_not_known_is_refused(version, file):
    described(file, kind=KIND.name, version=version, fingerprint={}, facts={})
    message = f"is {KIND.name} of version {version}; this msfp reads versions up to {KIND.version}"
    for opened in (header_of, read):
        with pytest.raises(InputError, match=message):
            opened(file, KIND)


def test_a_file_of_another_kind_is_refused(file, tmp_path):
    write(file, FileKind("a state of another"), {"x": torch.zeros(1)}, {})
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    # Only kinds that version 1 had read what it wrote.
    old = {"metadata": {"msfp_thing": "{}"}}
    save_file({"x": torch.zeros(1)}, tmp_path / "old.safetensors", **old)
    (tmp_path / "text.safetensors").write_text("none")
    for name, message in {
        "s": f"must be {KIND.name}, not a state of another",
        "plain": f"must be {KIND.name}, but its metadata have no such entry",
        "old": f"must be {KIND.name}, but its metadata have no such entry",
        "text": f"cannot be read as {KIND.name}",
        "none": f"cannot be read as {KIND.name}",
    }.items():
        each = tmp_path / f"{name}.safetensors"
        for opened in (header_of, read, lambda *of: check_fingerprint(*of, {})):
            with pytest.raises(InputError, match=f"{name}.safetensors {message}"):
                opened(each, KIND)


@pytest.mark.parametrize("told", ["no json", "[]", "{}", '{"kind": "a state of something"}'])
def test_damaged_metadata_are_refused(told, file):
    save_file({"x": torch.zeros(1)}, file, metadata={KEY: told})
    with pytest.raises(InputError, match=f"cannot be read as {KIND.name}"):
        header_of(file, KIND)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("damaged", [{"fingerprint": []}, {"facts": None}, {"facts": "a"}])
def test_a_fingerprint_or_facts_that_are_no_table_are_refused(damaged, version, file):
    whole = {"kind": KIND.name, "version": version, "fingerprint": {}, "facts": {}}
    described(file, **whole | damaged)
    with pytest.raises(InputError, match="the fingerprint and the facts must be tables"):
        header_of(file, KIND)


def test_damage_that_a_migration_comes_upon_is_refused(file):
    kind = FileKind("a state", first_key="a state", migrations={1: run_as_fingerprint})
    for facts in ("{}", "[]"):
        save_file({"x": torch.zeros(1)}, file, metadata={"a state": facts})
        with pytest.raises(InputError, match="cannot be read as a state"):
            header_of(file, kind)


REFUSED = {
    "differs": ({"seed": 1}, {"seed": 2}, "its seed is 1, not 2"),
    "older": ({}, {"seed": 2}, "it has no seed; this run has 2"),
    "newer": ({"hub": 2}, {}, "its hub is 2, which this run does not have"),
    "long": ({"path": [1.0] * 9}, {"path": [2.0] * 9}, "its path differ"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_of_another_run_is_refused_by_the_first_difference(case, file):
    saved, run, message = REFUSED[case]
    # What is the same, and what is another but later by its name, is not told.
    write(file, KIND, {"x": torch.zeros(1)}, {}, saved | {"a": 0, "z": 0})
    message = f"is {KIND.name} of another run: {message}$"
    with pytest.raises(InputError, match=message):
        check_fingerprint(file, KIND, run | {"a": 0, "z": 1})


def test_equal_files_have_equal_bytes_once_their_metadata_are_sorted(tmp_path):
    told = {"format": "pt", "msfp": '{"name": "\u00e4"}', "a": "", "z": "1"}
    tensors = {"b": torch.ones(3), "a": torch.ones(2, dtype=torch.float16)}
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        save_file(tensors, file, told)
        sort_metadata(file)
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == told
        assert all(torch.equal(opened.get_tensor(name), value) for name, value in tensors.items())
