import pytest
from torch import nn

import msfp
from msfp import QuantizationConfig, quantize
from msfp.support import progress
from msfp.support.progress import show_progress, shown_progress


class Bar:
    """Stands for a bar of tqdm, and notes what is asked of it."""

    def __init__(self, *, total, desc, disable):
        self.total, self.name, self.n, self.closed = total, desc, 0, False
        assert disable is None  # tqdm then draws in terminals alone

    def set_postfix_str(self, note, *, refresh):
        self.note = note
        assert not refresh

    def update(self, more):
        self.n += more

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    made = []
    monkeypatch.setattr(progress, "tqdm", lambda **words: made.append(Bar(**words)) or made[-1])
    monkeypatch.setattr(progress, "_bars", {})
    yield made
    show_progress(True)


def test_each_stage_has_a_bar_that_ends_with_it(bars):
    for done in (1, 2, 3):
        shown_progress("searching", done, 3, "conv_in")
        shown_progress("of another", 10 * done, 40)
    assert [(bar.name, bar.n, bar.total, bar.closed) for bar in bars] == [
        ("searching", 3, 3, True),
        ("of another", 30, 40, False),
    ]
    assert bars[0].note == "conv_in"


def test_a_stage_that_begins_again_after_an_interruption_has_a_new_bar(bars):
    shown_progress("searching", 2, 3)
    shown_progress("searching", 1, 3)
    assert [bar.n for bar in bars] == [2, 1]


def test_functions_show_progress_and_one_switch_stops_it(bars):
    config = QuantizationConfig(activation_bits=None, end_bits=4)
    quantize(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), config)
    assert [(bar.name, bar.n) for bar in bars] == [("searching", 2)]
    msfp.show_progress(False)
    quantize(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), config)
    assert len(bars) == 1


def test_of_several_processes_one_shows_progress(bars, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    shown_progress("searching", 1, 3)
    assert not bars
