import pytest
import torch
from torch import nn

from msfp import InputError
from msfp.pipelines.forward_files import load_forwards, save_forwards
from msfp.pipelines.recording import Recording

RUN = {"call": 0, "calls": 2}


def same(one, other):
    if isinstance(one, torch.Tensor):
        alike = (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        return alike and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return type(one) is type(other) and all(same(*pair) for pair in pairs)
    return one == other and type(one) is type(other)


def calls():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    text = torch.randn(2, 5).bfloat16()
    words = {"text": text, "scale": 0.5, "mask": None, "names": ["a", ("b", 1)], "flag": True}
    return [((image, torch.tensor(9)), words, [image.clone()]), ((image,), {"text": text}, ())]


def test_forwards_are_read_as_they_were_written_in_value_layout_and_type(tmp_path):
    file, given = tmp_path / "a.safetensors", calls()
    assert save_forwards(file, given, RUN)
    found = load_forwards(file, RUN)
    assert same(given, found)
    assert found[0][1]["text"] is found[1][1]["text"]  # one copy, as before
    assert all(x.data_ptr() % 64 == 0 for x in (found[0][0][0], found[0][1]["text"]))


def test_forwards_of_another_run_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_forwards(file, calls(), RUN)
    with pytest.raises(InputError, match="recorded forwards of another run: its call is 0, not 1"):
        load_forwards(file, RUN | {"call": 1})


@pytest.mark.parametrize("value", [object(), {1: 2}, torch.eye(2).to_sparse()])
def test_what_has_no_form_in_a_file_is_not_written(value, tmp_path):
    assert not save_forwards(tmp_path / "a.safetensors", [((), {"x": value}, ())], RUN)
    assert not list(tmp_path.iterdir())


class Takes(nn.Module):
    def forward(self, x, how=None):  # noqa: ARG002 - recorded
        return x


def test_calls_that_cannot_be_kept_are_said(tmp_path):
    recording = Recording(lambda network: network(torch.ones(2, 3), object()), tmp_path / "calls")
    with pytest.warns(UserWarning, match="calls are not kept in the state folder"):
        recording.calls[0](Takes())
