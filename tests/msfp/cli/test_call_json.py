"""Arguments of calls as JSON with files."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.io import wavfile

from msfp import InputError
from msfp.cli.call_json import call_from


@pytest.fixture
def files(tmp_path):
    """A folder with a file of every kind."""
    picture = Image.new("RGB", (6, 4), (255, 0, 0))
    picture.save(tmp_path / "cat.png")
    Image.new("L", (6, 4)).save(tmp_path / "mask.jpg")
    frames = [Image.new("RGB", (6, 4), (value, 0, 0)) for value in (0, 100, 200)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    wavfile.write(tmp_path / "tone.wav", 8000, np.array([[0, 32767], [-32767, 0]], np.int16))
    np.save(tmp_path / "array.npy", np.arange(3.0))
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    return tmp_path


def read(files, name):
    return call_from(f'{{"value": "{files / name}"}}')["value"]


def test_values_are_those_of_json():
    assert call_from(None) == {}
    assert call_from('{"a": 1, "b": [0.5, "text"], "c": null}') == {
        "a": 1,
        "b": [0.5, "text"],
        "c": None,
    }


def test_files_are_read_by_their_type(files):
    cat = read(files, "cat.png")
    assert (cat.size, cat.mode, cat.getpixel((0, 0))) == ((6, 4), "RGB", (255, 0, 0))
    assert read(files, "mask.jpg").mode == "RGB"
    assert [each.size for each in read(files, "clip.gif")] == [(6, 4)] * 3
    assert read(files, "tone.wav").tolist() == [[0, -1], [1, 0]]
    assert read(files, "array.npy").tolist() == [0, 1, 2]
    assert read(files, "one.safetensors").tolist() == [1, 1]
    assert sorted(read(files, "two.safetensors")) == ["a", "b"]


def test_files_are_read_in_lists_and_tables(files):
    cat = files / "cat.png"
    found = call_from(f'{{"images": ["{cat}", "{cat}"], "more": {{"image": "{cat}"}}}}')
    assert [each.size for each in found["images"]] == [(6, 4)] * 2
    assert found["more"]["image"].size == (6, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "call must be JSON, such as"),
        ("[1]", "call must be a JSON object of arguments, not"),
        ('{"image": "absent.png"}', "call has image='absent.png', which cannot be read: "),
        (
            '{"video": "absent.mp4"}',
            "call has video='absent.mp4', which cannot be read: there is no",
        ),
        ('{"a": {"b": "absent.npy"}}', r"call has a\.b='absent.npy', which cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(text, message):
    with pytest.raises(InputError, match=message):
        call_from(text)
