import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from msfp import InputError, load_calls, save_calls


class Recorder(nn.Module):
    """Keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.calls = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))


def test_a_call_comes_back_with_all_that_it_was_given(tmp_path):
    text = torch.randn(2, 3, dtype=torch.bfloat16)
    given = {
        "timestep": 5,
        "encoder_hidden_states": text.T,
        "added_cond_kwargs": {"text_embeds": text, "time_ids": [text[0], None]},
        "return_dict": False,
        "guidance": 2.5,
        "name": "fox",
    }
    first = Recorder()
    save_calls(first, tmp_path, calls=lambda network: network(torch.ones(2), **given))
    again = Recorder()
    for call in load_calls(tmp_path):
        call(again)
    ((args, kwargs),) = again.calls
    torch.testing.assert_close(args, (torch.ones(2),), rtol=0, atol=0)
    assert kwargs.keys() == given.keys()
    torch.testing.assert_close(kwargs.pop("added_cond_kwargs")["time_ids"][0], text[0])
    torch.testing.assert_close(kwargs.pop("encoder_hidden_states"), text.T, rtol=0, atol=0)
    assert all(kwargs[key] == given[key] for key in kwargs)


def test_more_calls_are_added_to_those_of_a_folder(tmp_path):
    network = Recorder()
    save_calls(network, tmp_path, calls=lambda network: [network(1), network(2)])
    save_calls(network, tmp_path, calls=lambda network: network(3))
    again = Recorder()
    for call in load_calls(tmp_path):
        call(again)
    assert again.calls == [((1,), {}), ((2,), {}), ((3,), {})]


def test_what_cannot_be_saved_or_read_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"argument\.args\.0 of the denoiser is a set"):
        save_calls(Recorder(), tmp_path, calls=lambda network: network({1}))
    with pytest.raises(InputError, match="holds no saved calls"):
        load_calls(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "00000.safetensors")
    with pytest.raises(InputError, match=r"00000\.safetensors must be a saved call, but its"):
        load_calls(tmp_path)[0](Recorder())
